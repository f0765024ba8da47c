"""KV of a rank whose memory rank 0 cannot map, because it is on another host or on a GPU of its own: rank 0 reads and
writes blocks of its pool over a connection (`Purpose.KV`, or a pair of sockets on one host).

    rank 0                                            other rank
      | -- READ: layers, blocks --------------------> |
      | <-- the blocks' bytes ----------------------- |
      | -- WRITE: slice, places, bytes -------------> |
      | <-- nothing, or why it was not written ------ |

One exchange at a time. A message: kind u8, length of the fields u32, of the bytes u64, CRC-32 of both u32, all
little-endian; then the fields as JSON, and the bytes. What was damaged on the way is not written, and is an error for
the reader.
"""

import contextlib
import json
import socket
import struct
import threading
import zlib
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from tandem.core.errors import InternalError, TransferError
from tandem.core.kv_layout import KvLayout
from tandem.kv_transfer.blocks import PoolView
from tandem.kv_transfer.places import Places
from tandem.kv_transfer.remote_pool import RemotePool
from tandem.kv_transfer.reshard import KvSlice

_HEADER = struct.Struct("<BIQI")
_MAX_FIELDS_BYTES = 16 << 20
_MAX_DATA_BYTES = 1 << 30


class _Kind(IntEnum):
    READ = 1
    WRITE = 2
    DONE = 3
    DAMAGED = 4


class RankPool(RemotePool):
    """Rank 0's end. Owns the connection."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        self._connection = connection
        self._rank = rank
        self._turn = threading.Lock()

    def read(self, layers: range, block_ids: Sequence[int], out: Tensor) -> None:
        fields = {"layers": [layers.start, layers.stop], "blocks": list(block_ids)}
        with self._turn:
            received = torch.empty_like(out, device="cpu") if out.is_cuda else out
            self._exchange(_Kind.READ, fields, b"", received)
        if out.is_cuda:
            out.copy_(received)

    def write(self, kv_slice: KvSlice, units: int, at: Places, values: Tensor) -> None:
        fields = {
            "layers": [kv_slice.layer_begin, kv_slice.layer_end],
            "heads": [kv_slice.head_begin, kv_slice.head_end],
            "units": units,
            "blocks": at.blocks.tolist(),
            "numbers": None if at.units is None else at.units.tolist(),
        }
        with self._turn:
            self._exchange(_Kind.WRITE, fields, _bytes_of(values.cpu().contiguous()), None)

    def close(self) -> None:
        self._connection.close()

    def _exchange(self, kind: _Kind, fields: dict[str, Any], data: "bytes | memoryview", out: Tensor | None) -> None:
        try:
            _send(self._connection, kind, fields, data)
            answer, _, received = _receive(self._connection, out)
        except _DamagedError as error:
            raise TransferError(f"KV of rank {self._rank} was damaged between the hosts") from error
        except (OSError, EOFError) as error:
            raise TransferError(f"KV of rank {self._rank} cannot be reached on its host") from error
        if answer is _Kind.DAMAGED:
            raise TransferError(f"KV for rank {self._rank} was damaged between the hosts")
        if out is not None and len(received) != out.numel():
            raise TransferError(f"rank {self._rank} sent {len(received)} bytes of KV instead of {out.numel()}")


def serve_pool(connection: socket.socket, pool: Tensor, layout: KvLayout) -> None:
    """The other rank's end: until rank 0 closes the connection. `pool` has the layout `layout`, of one rank. On a GPU
    it is read and written on a stream of its own, beside the steps. Raises InternalError for KV that it does not have.
    """
    with contextlib.ExitStack() as stack:
        if pool.is_cuda:
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(pool.device)))  # type: ignore[no-untyped-call]
        stack.enter_context(contextlib.suppress(EOFError, OSError))
        while True:
            _serve_one(connection, pool, layout)


def _serve_one(connection: socket.socket, pool: Tensor, layout: KvLayout) -> None:
    try:
        kind, fields, data = _receive(connection, None)
    except _DamagedError:
        _send(connection, _Kind.DAMAGED, {}, b"")
        return
    if kind is _Kind.READ:
        _send(connection, _Kind.DONE, {}, _bytes_of(_read(pool, layout, fields)))
    else:
        _write(pool, layout, fields, data)
        _send(connection, _Kind.DONE, {}, b"")


def _read(pool: Tensor, layout: KvLayout, fields: dict[str, Any]) -> Tensor:
    layers, block_ids = range(*fields["layers"]), fields["blocks"]
    _check(layout, layers, block_ids)
    num_bytes = 2 * len(layers) * len(block_ids) * layout.segment_bytes
    out = torch.empty(num_bytes, dtype=torch.uint8, device=pool.device)
    PoolView.over(pool, layout).take_blocks(layers, block_ids, out)
    return out.cpu()


def _write(pool: Tensor, layout: KvLayout, fields: dict[str, Any], data: memoryview) -> None:
    layers, heads, units = range(*fields["layers"]), range(*fields["heads"]), fields["units"]
    blocks, numbers = fields["blocks"], fields["numbers"]
    _check(layout, layers, blocks)
    if not 0 <= heads.start < heads.stop <= layout.num_kv_heads or not layout.block_size % units == 0:
        raise InternalError("rank 0 writes KV that this rank does not hold")
    view = PoolView.over(pool, layout, KvSlice(layers.start, layers.stop, heads.start, heads.stop), units)
    device = pool.device
    at = Places(torch.tensor(blocks, device=device), None if numbers is None else torch.tensor(numbers, device=device))
    whole = (len(layers), 2, len(blocks), len(heads), units, -1)
    by_unit = (len(layers), 2, len(heads), len(blocks), -1)
    values = torch.frombuffer(data, dtype=torch.uint8).view(view.word).to(device)
    view.put(slice(0, len(layers)), at, values.view(whole if numbers is None else by_unit))
    if pool.is_cuda:
        torch.cuda.current_stream(device).synchronize()  # the next step may read it


def _check(layout: KvLayout, layers: range, block_ids: Sequence[int]) -> None:
    if not (
        0 <= layers.start < layers.stop <= layout.num_layers
        and block_ids
        and min(block_ids) >= 0
        and max(block_ids) < layout.num_blocks
    ):
        raise InternalError("rank 0 names KV that this rank does not hold")


class _DamagedError(Exception):
    """A whole message with another checksum than its sender's."""


def _bytes_of(values: Tensor) -> memoryview:
    return values.view(-1).view(torch.uint8).numpy().data


def _send(connection: socket.socket, kind: _Kind, fields: dict[str, Any], data: "bytes | memoryview") -> None:
    text = json.dumps(fields).encode()
    crc = zlib.crc32(data, zlib.crc32(text))
    connection.sendall(_HEADER.pack(kind, len(text), len(data), crc) + text)
    connection.sendall(data)


def _receive(connection: socket.socket, out: Tensor | None) -> tuple[_Kind, dict[str, Any], memoryview]:
    """The next message; its bytes go to `out`, if there is one. Raises EOFError at the end, _DamagedError, and
    OSError."""
    header = bytearray(_HEADER.size)
    _fill(connection, memoryview(header))
    kind, fields_bytes, data_bytes, crc = _HEADER.unpack(header)
    expected = _MAX_DATA_BYTES if out is None else out.numel()
    if fields_bytes > _MAX_FIELDS_BYTES or data_bytes > expected or kind not in _Kind.__members__.values():
        raise OSError("the other rank sent something that is no message about KV")
    text = bytearray(fields_bytes)
    _fill(connection, memoryview(text))
    data = memoryview(bytearray(data_bytes)) if out is None else _bytes_of(out)[:data_bytes]
    _fill(connection, data)
    if zlib.crc32(data, zlib.crc32(text)) != crc:
        raise _DamagedError
    return _Kind(kind), json.loads(text), data


def _fill(connection: socket.socket, view: memoryview) -> None:
    while view:
        got = connection.recv_into(view)
        if got == 0:
            raise EOFError
        view = view[got:]

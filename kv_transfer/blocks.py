"""Views over a pool's blocks, and copies between them: everything here works in the calling thread."""

import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tandem.core.errors import TransferError
from tandem.core.kv_layout import DTYPE_BYTES, KvLayout
from tandem.core.transfer import Portion

# torch spreads a copy over several threads from this many elements on. Pieces stay below it: decode's steps need the
# other cores, and the threads would have to be started and to wait for each other.
_MAX_PIECE_WORDS = 32767
_CHUNK_BYTES = 4 << 20  # copied between two looks at the gate


Pieces = tuple[tuple[torch.Tensor, ...], ...]  # [block][piece]


class Gate:
    """Lets a copy stop between two chunks. Once `close` has returned, nothing more is written behind the gate."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the gate open for one chunk. Raises TransferError once it is closed."""
        with self._lock:
            if self._closed:
                raise TransferError("the transfer was given up")
            yield

    def close(self) -> None:
        """Waits for the chunk under way: a millisecond."""
        with self._lock:
            self._closed = True


class Window(NamedTuple):
    """A rectangle of a shipment, sent as one message: layers of the portion, positions in the block list."""

    layer_begin: int
    layer_end: int
    block_begin: int
    block_end: int


@dataclass(frozen=True, slots=True)
class PoolView:
    """A portion of one rank's pool: `words` is [layer, kv, block, head, word], over all blocks."""

    words: torch.Tensor

    @classmethod
    def over(cls, pool: torch.Tensor, layout: KvLayout, portion: Portion) -> "PoolView":
        """`pool` is contiguous, of any dtype, and at least `layout.pool_bytes` long."""
        head_bytes = layout.block_size * layout.head_dim * DTYPE_BYTES[layout.dtype]
        word = torch.int64 if head_bytes % 8 == 0 else torch.int16
        row = pool.view(-1).view(torch.uint8)[: layout.pool_bytes].view(word)
        whole = row.view(layout.num_layers, 2, layout.num_blocks, layout.num_kv_heads, head_bytes // word.itemsize)
        layers = slice(portion.layer_begin, portion.layer_end)
        return cls(whole[layers, :, :, portion.head_begin : portion.head_end])

    def pieces(self) -> Pieces:
        """Of every block, views that together are the block, each small enough to be copied in one thread.

        To be made once: making a view in Python takes as long as copying 20 KB.
        """
        num_layers = self.words.shape[0]
        step = max(1, _MAX_PIECE_WORDS // self.words[0, :, 0].numel())
        groups = [self.words[layer : layer + step].unbind(2) for layer in range(0, num_layers, step)]
        return tuple(zip(*groups, strict=True))

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over the portion's layers, K and V."""
        return self.words[:, :, 0].nbytes

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one block in one layer, K and V."""
        return self.block_bytes // self.words.shape[0]

    def window_shape(self, window: Window) -> tuple[int, int, int, int, int]:
        _, kv, _, heads, words = self.words.shape
        return (window.layer_end - window.layer_begin, kv, window.block_end - window.block_begin, heads, words)

    def gather(self, window: Window, block_index: torch.Tensor, staging: torch.Tensor) -> torch.Tensor:
        """Copy a window into the front of `staging` (uint8) and return that part of it."""
        part, shaped = self._staged(window, staging)
        layers = self.words[window.layer_begin : window.layer_end]
        torch.index_select(layers, 2, block_index[window.block_begin : window.block_end], out=shaped)
        return part

    def scatter(self, window: Window, block_index: torch.Tensor, staging: torch.Tensor) -> None:
        """Copy a window out of the front of `staging` into its blocks."""
        _, shaped = self._staged(window, staging)
        layers = self.words[window.layer_begin : window.layer_end]
        layers.index_copy_(2, block_index[window.block_begin : window.block_end], shaped)

    def window_bytes(self, window: Window) -> int:
        layers, kv, blocks, heads, words = self.window_shape(window)
        return layers * kv * blocks * heads * words * self.words.itemsize

    def _staged(self, window: Window, staging: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        part = staging[: self.window_bytes(window)]
        return part, part.view(self.words.dtype).view(self.window_shape(window))


def windows(num_layers: int, num_blocks: int, layer_block_bytes: int, window_bytes: int) -> list[Window]:
    """Cut a shipment into rectangles of at most `window_bytes` (but never less than one block of one layer), layer by
    layer. `layer_block_bytes` are those of one block in one layer, K and V. Both sides compute the same list."""
    assert window_bytes > 0
    if num_layers == 0 or num_blocks == 0:
        return []
    layers = max(1, min(num_layers, window_bytes // (layer_block_bytes * num_blocks)))
    blocks = max(1, min(num_blocks, window_bytes // layer_block_bytes))
    return [
        Window(layer, min(layer + layers, num_layers), block, min(block + blocks, num_blocks))
        for layer in range(0, num_layers, layers)
        for block in range(0, num_blocks, blocks)
    ]


def crc32(data: torch.Tensor, value: int = 0) -> int:
    """CRC-32 (zlib's) of a contiguous uint8 tensor, continuing from `value`."""
    return zlib.crc32(data.cpu().numpy().data, value)


def gather_checksum(view: PoolView, block_ids: Sequence[int], plan: Sequence[Window]) -> int:
    """CRC-32 of the blocks' bytes in the order in which the windows would be sent."""
    index = torch.tensor(block_ids, device=view.words.device)
    staging = torch.empty(max(map(view.window_bytes, plan), default=0), dtype=torch.uint8, device=view.words.device)
    value = 0
    for window in plan:
        value = crc32(view.gather(window, index, staging), value)
    return value


def copy_blocks(
    source: Pieces, source_ids: Sequence[int], destination: Pieces, destination_ids: Sequence[int], gate: Gate
) -> None:
    """Copy blocks from pool to pool, without a copy in between. Raises TransferError when the gate is closed first.

    One call of `_foreach_copy_` moves a chunk of many pieces without the interpreter lock: taking it back between the
    pieces would let the engine's thread delay each of them.
    """
    step = max(1, _CHUNK_BYTES // sum(piece.nbytes for piece in source[0]))
    for begin in range(0, len(source_ids), step):
        pieces = [piece for block in source_ids[begin : begin + step] for piece in source[block]]
        targets = [piece for block in destination_ids[begin : begin + step] for piece in destination[block]]
        with gate.open():
            torch._foreach_copy_(targets, pieces)

"""Process groups of two ranks, prefill 0 and decode 1, and how the chunks of a transfer go through them.

Gloo's behaviour when a peer dies, stalls or disagrees was measured; three rules follow. A group that had any error or
timeout is broken and is never used again. The receiver posts exactly the bytes that were granted, because more would
abort its process. Bytes arrive in a staging buffer of the link, never in the pool: a receive that hangs until its
timeout writes to no block.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch.distributed import ProcessGroupGloo

from tandem.core.errors import TransferError
from tandem.kv_transfer.blocks import PoolView, TransferChunk, WriteFence, crc32
from tandem.kv_transfer.rendezvous import RendezvousStore

PREFILL_RANK = 0
DECODE_RANK = 1
_TAG = 0  # one transfer at a time; messages of one tag stay in order
_NEVER_SENT_TAG = 2**31 - 1


class PendingOperation(Protocol):
    """A send or receive under way."""

    def wait(self, timeout_s: float) -> None:
        """Raises TransferError; the group is broken then."""
        ...


class TwoRankGroup(Protocol):
    """One rank of a process group of two. Used by its owner thread only, except for `abort`."""

    @property
    def device(self) -> torch.device: ...

    def send(self, data: torch.Tensor) -> PendingOperation: ...

    def receive(self, data: torch.Tensor) -> PendingOperation: ...

    def stream(self) -> AbstractContextManager[object]:
        """The device stream of the group's gathers and scatters."""
        ...

    def synchronize(self) -> None:
        """Return when everything queued on `stream` is done."""
        ...

    def abort(self) -> None:
        """Make operations under way fail, as far as the library can. From any thread; may block."""
        ...


class GlooDevice:
    """The one gloo device of a process (its listening socket and loop thread), made when first needed.

    All groups share it; a device each would cost five descriptors and two threads.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._device: object = None

    def get(self) -> object:
        with self._lock:
            if self._device is None:
                self._device = ProcessGroupGloo.create_device(hostname=self._host, lazy_init=False)
            return self._device

    def close(self) -> None:
        """The device ends with the last group that uses it."""
        with self._lock:
            self._device = None


class _GlooOperation:
    def __init__(self, work: Any, keep: torch.Tensor) -> None:
        self._work = work
        self._keep = keep  # gloo reads and writes it until the wait is over

    def wait(self, timeout_s: float) -> None:
        try:
            self._work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise TransferError("the KV link broke while bytes were moving") from error


class GlooGroup:
    """Between CPUs. Neither encrypted nor authenticated: for networks that only the cluster reaches."""

    def __init__(self, group: Any, peer_rank: int) -> None:
        self._group = group
        self._peer_rank = peer_rank
        self.device = torch.device("cpu")

    @classmethod
    def connect(cls, rank: int, store: RendezvousStore, device: GlooDevice, timeout_s: float) -> "GlooGroup":
        """Blocks until the other rank does the same. Raises TransferError after `timeout_s`."""
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        options._devices = [device.get()]
        try:
            group = ProcessGroupGloo(store, rank, 2, options)
        except RuntimeError as error:
            raise TransferError("the two ranks of the KV link did not connect") from error
        return cls(group, 1 - rank)

    def send(self, data: torch.Tensor) -> PendingOperation:
        return self._post(lambda: self._group.send([data], self._peer_rank, _TAG), data)

    def receive(self, data: torch.Tensor) -> PendingOperation:
        return self._post(lambda: self._group.recv([data], self._peer_rank, _TAG), data)

    def _post(self, start: Callable[[], object], data: torch.Tensor) -> PendingOperation:
        try:
            return _GlooOperation(start(), data)
        except RuntimeError as error:
            raise TransferError("the KV link is broken") from error

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def synchronize(self) -> None:
        pass

    def abort(self) -> None:
        # gloo's own abort() does nothing. A wait that times out closes the group and wakes the other operations.
        nothing = torch.empty(1, dtype=torch.uint8)
        with contextlib.suppress(TransferError):
            self._post(lambda: self._group.recv([nothing], self._peer_rank, _NEVER_SENT_TAG), nothing).wait(0.001)


class StagingBuffers:
    """Two buffers of one chunk each, so that one is filled while the other is on its way."""

    def __init__(self, chunk_bytes: int, device: torch.device) -> None:
        self.chunk_bytes = chunk_bytes
        self.buffers = [torch.empty(chunk_bytes, dtype=torch.uint8, device=device) for _ in range(2)]


def send_chunks(
    group: TwoRankGroup,
    view: PoolView,
    block_ids: Sequence[int],
    chunks: Sequence[TransferChunk],
    staging: StagingBuffers,
    *,
    timeout_s: float,
    checksum: bool,
) -> int:
    """Send the chunks in order; `timeout_s` bounds each. Returns their CRC-32, or 0. Raises TransferError."""
    crc = 0
    pending: list[PendingOperation | None] = [None, None]
    with group.stream():
        index = torch.tensor(block_ids, device=group.device)
        for i, chunk in enumerate(chunks):
            before = pending[i % 2]
            if before is not None:
                before.wait(timeout_s)
            part = view.gather(chunk, index, staging.buffers[i % 2])
            if checksum:
                crc = crc32(part, crc)
            pending[i % 2] = group.send(part)
        for i in range(len(chunks), len(chunks) + 2):
            last = pending[i % 2]
            if last is not None:
                last.wait(timeout_s)
    return crc


def receive_chunks(
    group: TwoRankGroup,
    view: PoolView,
    block_ids: Sequence[int],
    chunks: Sequence[TransferChunk],
    staging: StagingBuffers,
    fence: WriteFence,
    *,
    timeout_s: float,
    checksum: bool,
) -> int:
    """Receive the chunks in order into the blocks. Returns their CRC-32, or 0. Raises TransferError."""
    crc = 0
    with group.stream():
        index = torch.tensor(block_ids, device=group.device)

        def post(i: int) -> tuple[PendingOperation, torch.Tensor]:
            part = staging.buffers[i % 2][: view.chunk_bytes(chunks[i])]
            return group.receive(part), part

        posted = [post(i) for i in range(min(2, len(chunks)))]
        for i, chunk in enumerate(chunks):
            pending, part = posted[i % 2]
            pending.wait(timeout_s)
            if checksum:
                crc = crc32(part, crc)
            with fence.writing():
                view.scatter(chunk, index, part)
                group.synchronize()
            if i + 2 < len(chunks):
                posted[i % 2] = post(i + 2)
    return crc

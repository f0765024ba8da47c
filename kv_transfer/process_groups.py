"""Process groups of two ranks, prefill 0 and decode 1, and how the chunks of a transfer go through them.

Gloo's behaviour when a peer dies, stalls or disagrees was measured; three rules follow. A group that had any error or
timeout is broken and is never used again. The receiver posts exactly the bytes that were granted, because more would
abort its process. Bytes arrive in a staging buffer of the link, never in the pool: a receive that hangs until its
timeout writes to no block.
"""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from itertools import cycle
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Work

from tandem.core.errors import TransferError
from tandem.kv_transfer.arrival import ArrivingBlocks
from tandem.kv_transfer.blocks import LeavingBlocks, crc32
from tandem.kv_transfer.fence import WriteFence
from tandem.kv_transfer.rendezvous import RendezvousStore

PREFILL_RANK = 0
DECODE_RANK = 1
_TAG = 0  # one transfer at a time; messages of one tag stay in order
_NEVER_SENT_TAG = 2**31 - 1


class PendingOperation:
    """A send or receive under way."""

    def __init__(self, work: Work, data: torch.Tensor, wait: Callable[[Work, float], None]) -> None:
        self._work = work
        self._data = data  # the library reads or writes it until the wait is over
        self._wait = wait

    def wait(self, timeout_s: float) -> None:
        """Raises TransferError; the group is broken then."""
        try:
            self._wait(self._work, timeout_s)
        except RuntimeError as error:
            raise TransferError("the KV link broke while bytes were moving") from error


class TwoRankGroup(ABC):
    """One rank of a process group of two. Used by its owner thread only, except for `abort`."""

    def __init__(self, group: Any, rank: int, device: torch.device) -> None:
        self._group = group
        self._peer_rank = 1 - rank
        self.device = device

    def send(self, data: torch.Tensor) -> PendingOperation:
        """Raises TransferError, as `receive`. `data` is contiguous uint8."""
        return self._start(self._group.send, data, _TAG)

    def receive(self, data: torch.Tensor) -> PendingOperation:
        return self._start(self._group.recv, data, _TAG)

    @abstractmethod
    def stream(self) -> AbstractContextManager[object]:
        """The device stream of the group's gathers and scatters."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when everything queued on `stream` is done."""

    @abstractmethod
    def abort(self) -> None:
        """Make operations under way fail, as far as the library can. From any thread; may block."""

    @staticmethod
    @abstractmethod
    def _wait(work: Work, timeout_s: float) -> None:
        """Return when the operation is done. Raises RuntimeError or TransferError."""

    def _start(self, operation: Callable[..., Work], data: torch.Tensor, tag: int) -> PendingOperation:
        try:
            return PendingOperation(operation([data], self._peer_rank, tag), data, self._wait)
        except RuntimeError as error:
            raise TransferError("the KV link is broken") from error


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


class GlooGroup(TwoRankGroup):
    """Between CPUs. Neither encrypted nor authenticated: for networks that only the cluster reaches."""

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
        return cls(group, rank, torch.device("cpu"))

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def synchronize(self) -> None:
        pass

    def abort(self) -> None:
        # gloo's own abort() does nothing. A wait that times out closes the group and wakes the other operations.
        nothing = torch.empty(1, dtype=torch.uint8)
        with contextlib.suppress(TransferError):
            self._start(self._group.recv, nothing, _NEVER_SENT_TAG).wait(0.001)

    @staticmethod
    def _wait(work: Work, timeout_s: float) -> None:
        work.wait(timedelta(seconds=timeout_s))


def send_chunks(
    group: TwoRankGroup,
    transfer: LeavingBlocks,
    staging: list[torch.Tensor],
    scratch: torch.Tensor,
    *,
    timeout_s: float,
    checksum: bool,
) -> int:
    """Send the chunks in order; `timeout_s` bounds each. Returns the CRC-32 of what was sent, or 0. Raises
    TransferError.

    `staging` are buffers for the largest chunk (uint8): one is filled while another is on its way. `scratch` is one,
    too, and may be empty where nothing is coded.
    """
    crc = 0
    pending: deque[PendingOperation] = deque()
    with group.stream():
        for chunk, buffer in zip(transfer.chunks, cycle(staging), strict=False):
            if len(pending) == len(staging):
                pending.popleft().wait(timeout_s)
            part = transfer.pack(chunk, buffer, scratch)
            if checksum:
                crc = crc32(part, crc)
            pending.append(group.send(part))
        for operation in pending:
            operation.wait(timeout_s)
    return crc


def receive_chunks(
    group: TwoRankGroup,
    transfer: ArrivingBlocks,
    staging: list[torch.Tensor],
    scratch: torch.Tensor,
    fence: WriteFence,
    *,
    timeout_s: float,
    checksum: bool,
) -> int:
    """Receive the chunks in order into the blocks, as `send_chunks` sends them."""
    crc = 0
    sizes = map(transfer.sent_bytes, transfer.chunks)
    parts = [buffer[:size] for size, buffer in zip(sizes, cycle(staging), strict=False)]
    with group.stream():
        pending = deque(map(group.receive, parts[: len(staging)]))
        for i, (chunk, part) in enumerate(zip(transfer.chunks, parts, strict=True)):
            pending.popleft().wait(timeout_s)
            if checksum:
                crc = crc32(part, crc)
            raw = transfer.unpack(chunk, part, scratch)
            with fence.writing():
                transfer.scatter(chunk, raw)
                group.synchronize()
            pending.extend(map(group.receive, parts[i + len(staging) :][:1]))
    return crc

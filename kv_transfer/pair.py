"""A process group of two ranks, prefill 0 and decode 1, and the moving of a shipment's windows through it.

What gloo does when a peer dies, stalls or disagrees was measured; three rules follow. A pair that had any error or
timeout is dead and is never used again. The receiver posts exactly the bytes that were agreed before, because more
would abort its process. Bytes land in a staging buffer that the pair owns, never in the pool: a receive that hangs
until its timeout holds no block of anybody.
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
from tandem.kv_transfer.blocks import Gate, PoolView, Window, crc32
from tandem.kv_transfer.rendezvous import Board, BoardStore

PREFILL_RANK = 0
DECODE_RANK = 1
_TAG = 0  # one shipment at a time, messages of one tag stay in order
_NEVER_SENT_TAG = 2**31 - 1


class Pending(Protocol):
    """An operation under way."""

    def wait(self, timeout_s: float) -> None:
        """Raises TransferError; the pair is dead then."""
        ...


class Pair(Protocol):
    """One end of a pair. Used by its owner thread only, but for `abort`."""

    @property
    def device(self) -> torch.device: ...

    def send(self, data: torch.Tensor) -> Pending: ...

    def receive(self, data: torch.Tensor) -> Pending: ...

    def stream(self) -> AbstractContextManager[object]:
        """Where gathers and scatters of this pair are queued."""
        ...

    def settle(self) -> None:
        """Return when everything queued on `stream` is done."""
        ...

    def abort(self) -> None:
        """Make operations under way fail, as far as the library can. From any thread; takes milliseconds."""
        ...


class GlooDevice:
    """The one gloo device of a process (its listening socket and loop thread), made when first needed.

    All pairs share it; a device each would cost five descriptors and two threads.
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
        """It ends with the last pair that uses it."""
        with self._lock:
            self._device = None


class _GlooPending:
    def __init__(self, work: Any, keep: torch.Tensor) -> None:
        self._work = work
        self._keep = keep  # gloo reads and writes it until the wait is over

    def wait(self, timeout_s: float) -> None:
        try:
            self._work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise TransferError("the KV link broke while bytes were moving") from error


class GlooPair:
    """Between CPUs. Neither encrypted nor authenticated: for networks that only the cluster reaches."""

    def __init__(self, group: Any, peer_rank: int) -> None:
        self._group = group
        self._peer_rank = peer_rank
        self.device = torch.device("cpu")

    @classmethod
    def connect(cls, rank: int, board: Board, device: GlooDevice, timeout_s: float) -> "GlooPair":
        """Blocks until the other rank does the same. Raises TransferError after `timeout_s`."""
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        options._devices = [device.get()]
        try:
            group = ProcessGroupGloo(BoardStore(board, timeout_s), rank, 2, options)
        except RuntimeError as error:
            raise TransferError("the two workers did not find each other for the KV link") from error
        return cls(group, 1 - rank)

    def send(self, data: torch.Tensor) -> Pending:
        return self._post(lambda: self._group.send([data], self._peer_rank, _TAG), data)

    def receive(self, data: torch.Tensor) -> Pending:
        return self._post(lambda: self._group.recv([data], self._peer_rank, _TAG), data)

    def _post(self, start: Callable[[], object], data: torch.Tensor) -> Pending:
        try:
            return _GlooPending(start(), data)
        except RuntimeError as error:
            raise TransferError("the KV link is broken") from error

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def settle(self) -> None:
        pass

    def abort(self) -> None:
        # gloo's own abort() does nothing. A wait that times out closes the pair and wakes the other operations.
        nothing = torch.empty(1, dtype=torch.uint8)
        with contextlib.suppress(TransferError):
            self._post(lambda: self._group.recv([nothing], self._peer_rank, _NEVER_SENT_TAG), nothing).wait(0.001)


class Staging:
    """Two buffers of one window each, so that one is filled while the other is on its way."""

    def __init__(self, window_bytes: int, device: torch.device) -> None:
        self.window_bytes = window_bytes
        self.buffers = [torch.empty(window_bytes, dtype=torch.uint8, device=device) for _ in range(2)]


def send_windows(
    pair: Pair,
    view: PoolView,
    block_ids: Sequence[int],
    windows: Sequence[Window],
    staging: Staging,
    *,
    timeout_s: float,
    checksum: bool,
) -> int:
    """Send the windows in order; `timeout_s` bounds each. Returns their CRC-32, or 0. Raises TransferError."""
    crc = 0
    pending: list[Pending | None] = [None, None]
    with pair.stream():
        index = torch.tensor(block_ids, device=pair.device)
        for i, window in enumerate(windows):
            before = pending[i % 2]
            if before is not None:
                before.wait(timeout_s)
            part = view.gather(window, index, staging.buffers[i % 2])
            if checksum:
                crc = crc32(part, crc)
            pending[i % 2] = pair.send(part)
        for i in range(len(windows), len(windows) + 2):
            last = pending[i % 2]
            if last is not None:
                last.wait(timeout_s)
    return crc


def receive_windows(
    pair: Pair,
    view: PoolView,
    block_ids: Sequence[int],
    windows: Sequence[Window],
    staging: Staging,
    gate: Gate,
    *,
    timeout_s: float,
    checksum: bool,
) -> int:
    """Receive the windows in order into the blocks. Returns their CRC-32, or 0. Raises TransferError."""
    crc = 0
    with pair.stream():
        index = torch.tensor(block_ids, device=pair.device)

        def post(i: int) -> tuple[Pending, torch.Tensor]:
            part = staging.buffers[i % 2][: view.window_bytes(windows[i])]
            return pair.receive(part), part

        posted = [post(i) for i in range(min(2, len(windows)))]
        for i, window in enumerate(windows):
            pending, part = posted[i % 2]
            pending.wait(timeout_s)
            if checksum:
                crc = crc32(part, crc)
            with gate.open():
                view.scatter(window, index, part)
                pair.settle()
            if i + 2 < len(windows):
                posted[i % 2] = post(i + 2)
    return crc

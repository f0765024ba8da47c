"""The two ends of a link over a process group: an owner thread each, which alone touches the pair.

A link that had an error is dead: `kill` wakes what hangs as far as the library can, and the thread ends by itself, at
the latest when its operation's timeout has passed. The next fetch makes a new link, with a new id.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import torch

from tandem.core.errors import TransferError
from tandem.core.transfer import Transport
from tandem.kv_transfer.blocks import Gate, PoolView, Window
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.owner_thread import OwnerThread
from tandem.kv_transfer.pair import (
    PREFILL_RANK,
    GlooDevice,
    GlooPair,
    Pair,
    Staging,
    receive_windows,
    send_windows,
)
from tandem.kv_transfer.pair_nccl import NcclPair
from tandem.kv_transfer.rendezvous import Board

PROBE_BYTES = 4 << 20
_PROBES = 3  # the first ones only warm the connection up

Result = TypeVar("Result")


class PairMaker:
    """Makes this process's ends of pairs, for pools on `device`."""

    def __init__(self, device: torch.device, config: LinkConfig) -> None:
        self._device = device
        self._config = config
        self._gloo = GlooDevice(config.bind_host)

    @property
    def transport(self) -> Transport:
        """The transport by which pools on this device travel."""
        return Transport.GLOO if self._device.type == "cpu" else Transport.NCCL

    def close(self) -> None:
        """Give back what all pairs shared. It is made again when needed."""
        self._gloo.close()

    def connect(self, rank: int, board: Board) -> Pair:
        """Blocks until the other rank does the same. Raises TransferError."""
        if self.transport is Transport.GLOO:
            return GlooPair.connect(rank, board, self._gloo, self._config.link_timeout_s)
        return NcclPair.connect(rank, board, self._device, self._config.link_timeout_s)


class GroupLink:
    """One end of a link over a pair. Its methods are called on the event loop; its jobs run in its thread."""

    def __init__(self, config: LinkConfig, owner: OwnerThread, board: Board) -> None:
        self._config = config
        self._owner = owner
        self._board = board
        self._ready: Future[None] = Future()
        self._staging: Staging | None = None
        self._pair: Pair | None = None
        self.dead = False
        self.bytes_per_s = 0.0  # measured when it was made

    @classmethod
    def start(cls, maker: PairMaker, config: LinkConfig, rank: int, board: Board, name: str) -> "GroupLink":
        """Begin to connect, in a new thread; `ready` tells the outcome."""
        link = cls(config, OwnerThread.start(name), board)
        link._ready = link._owner.submit(partial(link._connect, maker, rank))
        return link

    async def ready(self) -> None:
        """Return when the pair has been made and tried. Raises TransferError."""
        try:
            await asyncio.shield(asyncio.wrap_future(self._ready))  # others may be waiting for it too
        except TransferError:
            self.kill()
            raise

    async def send(self, view: PoolView, block_ids: Sequence[int], plan: Sequence[Window], checksum: bool) -> int:
        """Returns the CRC-32, or 0. Raises TransferError. The link is dead after any error or cancellation."""
        return await self._run(lambda pair: self._send(pair, view, block_ids, plan, checksum))

    async def receive(
        self, view: PoolView, block_ids: Sequence[int], plan: Sequence[Window], gate: Gate, checksum: bool
    ) -> int:
        """As `send`. Nothing is written behind `gate` once it is closed, even while the thread still hangs."""
        return await self._run(lambda pair: self._receive(pair, view, block_ids, plan, gate, checksum))

    def kill(self) -> None:
        """The link is dead from now on; what was under way fails. Takes milliseconds."""
        if self.dead:
            return
        self.dead = True
        self._board.close()
        if self._pair is not None:
            self._pair.abort()
        self._owner.submit(self._forget)
        self._owner.stop()

    def join(self, timeout_s: float) -> bool:
        """After `kill`: True when the thread has ended and given everything back."""
        return self._owner.join(timeout_s)

    async def _run(self, job: Callable[[Pair], Result]) -> Result:
        if self.dead:
            raise TransferError("the KV link is broken")
        try:
            return await asyncio.wrap_future(self._owner.submit(partial(self._with_pair, job)))
        except BaseException:
            self.kill()
            raise

    # --- in the owner thread ---

    def _connect(self, maker: PairMaker, rank: int) -> None:
        pair = maker.connect(rank, self._board)
        if self.dead:
            raise TransferError("the KV link was given up")
        self._pair = pair
        probe = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=pair.device)
        timeout_s = self._config.operation_timeout_s(PROBE_BYTES)
        with pair.stream():
            for _ in range(_PROBES):
                started_s = time.perf_counter()
                operation = pair.send(probe) if rank == PREFILL_RANK else pair.receive(probe)
                operation.wait(timeout_s)
                pair.settle()
                self.bytes_per_s = PROBE_BYTES / (time.perf_counter() - started_s)

    def _forget(self) -> None:
        """The last reference to a group closes its sockets and ends its threads."""
        self._pair = self._staging = None

    def _with_pair(self, job: Callable[[Pair], Result]) -> Result:
        if self.dead or self._pair is None:
            raise TransferError("the KV link is broken")
        return job(self._pair)

    def _send(
        self, pair: Pair, view: PoolView, block_ids: Sequence[int], plan: Sequence[Window], checksum: bool
    ) -> int:
        staging, timeout_s = self._stage(pair, view, plan)
        return send_windows(pair, view, block_ids, plan, staging, timeout_s=timeout_s, checksum=checksum)

    def _receive(
        self, pair: Pair, view: PoolView, block_ids: Sequence[int], plan: Sequence[Window], gate: Gate, checksum: bool
    ) -> int:
        staging, timeout_s = self._stage(pair, view, plan)
        return receive_windows(pair, view, block_ids, plan, staging, gate, timeout_s=timeout_s, checksum=checksum)

    def _stage(self, pair: Pair, view: PoolView, plan: Sequence[Window]) -> tuple[Staging, float]:
        needed = max(map(view.window_bytes, plan), default=0)
        if self._staging is None or self._staging.window_bytes < needed:
            self._staging = Staging(needed, pair.device)
        return self._staging, self._config.operation_timeout_s(needed)

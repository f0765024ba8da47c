"""The two ends of a link over a process group: an owner thread each, the only thread that uses the group.

A link that had an error is closed: `close` wakes operations that hang as far as the library can, and the thread ends
by itself, at the latest when its operation's timeout has passed. The next fetch makes a new link, with a new id.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import torch

from tandem.core.errors import TransferError
from tandem.core.transfer import Transport
from tandem.kv_transfer.arrival import ArrivingBlocks
from tandem.kv_transfer.blocks import ChunkedBlocks, LeavingBlocks
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.fence import WriteFence
from tandem.kv_transfer.nccl_group import NcclGroup
from tandem.kv_transfer.owner_thread import OwnerThread
from tandem.kv_transfer.process_groups import (
    PREFILL_RANK,
    GlooDevice,
    GlooGroup,
    TwoRankGroup,
    receive_chunks,
    send_chunks,
)
from tandem.kv_transfer.rendezvous import RendezvousStore

PROBE_BYTES = 4 << 20
_PROBES = 3  # the first ones only warm the connection up


class ProcessGroupFactory:
    """Makes this process's ranks of two-rank process groups, for pools on `device`."""

    def __init__(self, device: torch.device, config: LinkConfig) -> None:
        self._device = device
        self._config = config
        self._gloo = GlooDevice(config.bind_host)

    @property
    def transport(self) -> Transport:
        """The transport between pools on this kind of device."""
        return Transport.GLOO if self._device.type == "cpu" else Transport.NCCL

    def connect(self, rank: int, store: RendezvousStore) -> TwoRankGroup:
        """Blocks until the other rank does the same. Raises TransferError."""
        if self.transport is Transport.GLOO:
            return GlooGroup.connect(rank, store, self._gloo, self._config.link_timeout_s)
        return NcclGroup.connect(rank, store, self._device, self._config.link_timeout_s)

    def close(self) -> None:
        """Release the resources that all groups share; they are made again when needed."""
        self._gloo.close()


class ProcessGroupLink:
    """One end of a link over a process group. Its methods are called on the event loop; its jobs run in its thread."""

    def __init__(self, config: LinkConfig, owner: OwnerThread, store: RendezvousStore) -> None:
        self._config = config
        self._owner = owner
        self._aborter: OwnerThread | None = None
        self._store = store
        self._ready: Future[None] = Future()
        self._staging: list[torch.Tensor] = []
        self._group: TwoRankGroup | None = None
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed = False
        self.bytes_per_s = 0.0  # measured when the link was made

    @classmethod
    def start(
        cls, factory: ProcessGroupFactory, config: LinkConfig, rank: int, store: RendezvousStore, name: str
    ) -> "ProcessGroupLink":
        """Begin to connect, in a new thread; `ready` tells the outcome."""
        link = cls(config, OwnerThread.start(name), store)
        link._ready = link._owner.submit(partial(link._connect, factory, rank))
        return link

    async def ready(self) -> None:
        """Return when the group is connected and has been tried. Raises TransferError."""
        try:
            await asyncio.shield(asyncio.wrap_future(self._ready))  # several tasks may wait for it
        except TransferError:
            self.close()
            raise

    async def send(self, transfer: LeavingBlocks, checksum: bool) -> int:
        """Returns the CRC-32, or 0. Raises TransferError. Any error or cancellation closes the link."""
        return await self._run(transfer, partial(send_chunks, checksum=checksum))

    async def receive(self, transfer: ArrivingBlocks, fence: WriteFence, checksum: bool) -> int:
        """As `send`. Nothing is written once `fence` is closed, even while the thread still hangs."""
        return await self._run(transfer, partial(receive_chunks, fence=fence, checksum=checksum))

    def close(self) -> None:
        """Operations under way fail, and no more can begin. Does not wait: the abort, which may block, has a thread of
        its own."""
        if self.closed:
            return
        self.closed = True
        self._end.set_result(None)
        self._store.close()
        if self._group is not None:
            self._aborter = OwnerThread.start("kv-abort")
            self._aborter.submit(self._group.abort)
            self._aborter.stop()
        self._owner.submit(self._release)
        self._owner.stop()

    def join(self, timeout_s: float) -> bool:
        """After `close`: True when the threads have ended and released everything."""
        return self._owner.join(timeout_s) and (self._aborter is None or self._aborter.join(timeout_s))

    async def _run(self, transfer: ChunkedBlocks, move: Callable[..., int]) -> int:
        """Ends with the link, even while the thread still hangs: gloo may take seconds to notice."""
        if self.closed:
            raise TransferError("the KV link is broken")
        moving = asyncio.wrap_future(self._owner.submit(partial(self._move, transfer, move)))
        try:
            await asyncio.wait((moving, self._end), return_when=asyncio.FIRST_COMPLETED)
            if not moving.done():
                raise TransferError("the KV link has ended")
            return moving.result()
        except BaseException:
            if not moving.cancel() and not moving.cancelled():
                moving.exception()  # the caller gets another reason; asyncio would log this one with a traceback
            self.close()
            raise

    # --- in the owner thread ---

    def _connect(self, factory: ProcessGroupFactory, rank: int) -> None:
        group = factory.connect(rank, self._store)
        if self.closed:
            raise TransferError("the KV link was given up")
        self._group = group
        probe = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=group.device)
        timeout_s = self._config.operation_timeout_s(PROBE_BYTES)
        with group.stream():
            for _ in range(_PROBES):
                started_s = time.perf_counter()
                operation = group.send(probe) if rank == PREFILL_RANK else group.receive(probe)
                operation.wait(timeout_s)
                group.synchronize()
                self.bytes_per_s = PROBE_BYTES / (time.perf_counter() - started_s)

    def _release(self) -> None:
        """The last reference to a group closes its sockets and ends its threads."""
        self._group = None
        self._staging = []

    def _move(self, transfer: ChunkedBlocks, move: Callable[..., int]) -> int:
        if self.closed or self._group is None:
            raise TransferError("the KV link is broken")
        needed = transfer.staging_bytes
        if not self._staging or len(self._staging[0]) < needed:
            device = self._group.device
            sizes = (needed, needed, needed if transfer.coder else 0)
            self._staging = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        *staging, scratch = self._staging
        return move(self._group, transfer, staging, scratch, timeout_s=self._config.operation_timeout_s(needed))

"""Decode's end of a link on one host: the prefill worker's pool, mapped read-only, and a thread to copy from it."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from tandem.core.errors import TransferError
from tandem.core.kv_layout import KvLayout
from tandem.core.transfer import KvSlice, LinkReply
from tandem.kv_transfer.blocks import BlockTransfer, BlockViews, PoolView, WriteFence, copy_blocks
from tandem.kv_transfer.descriptors import fetch_descriptor
from tandem.kv_transfer.owner_thread import OwnerThread
from tandem.kv_transfer.pool import map_read_only

_PROBE_BYTES = 16 << 20

Result = TypeVar("Result")


class UnreachableMemoryError(TransferError):
    """Both workers have one host and one user, but the pool cannot be mapped (another network namespace, say)."""


class SharedMemoryLink:
    """Its methods are called on the event loop; its jobs run in its thread, which alone holds the mapping.

    The memory of a prefill worker that dies stays readable, so a copy never fails half-way. Only the acknowledgement
    says whether the blocks held the right KV during the copy.
    """

    def __init__(self, owner: OwnerThread) -> None:
        self._owner = owner
        self._source: BlockViews | None = None
        self.closed = False
        self.bytes_per_s = 0.0  # measured when the link was made

    @classmethod
    async def open(cls, reply: LinkReply, layout: KvLayout, kv_slice: KvSlice, name: str) -> "SharedMemoryLink":
        """`layout` and `kv_slice` are of the source's pool. Raises UnreachableMemoryError."""
        link = cls(OwnerThread.start(name))
        try:
            await link._run(partial(link._map, reply, layout, kv_slice))
        except BaseException as error:
            link.close()
            if isinstance(error, TransferError | OSError):
                raise UnreachableMemoryError("the prefill worker's memory cannot be mapped from here") from error
            raise
        return link

    async def copy(
        self, source_ids: Sequence[int], destination: BlockViews, block_ids: Sequence[int], fence: WriteFence
    ) -> None:
        """Copy blocks of the source's pool to `destination`. Raises TransferError once the fence is closed."""

        def job() -> None:
            if self._source is None:
                raise TransferError("the KV link is broken")
            copy_blocks(self._source, source_ids, destination, block_ids, fence)

        await self._run(job)

    async def checksum(self, transfer: BlockTransfer) -> int:
        """CRC-32 of blocks that have been copied."""
        return await self._run(transfer.checksum)

    def close(self) -> None:
        """Unmap the source after the job under way. Does not wait."""
        if not self.closed:
            self.closed = True
            self._owner.submit(self._unmap)
            self._owner.stop()

    def join(self, timeout_s: float) -> bool:
        """After `close`: True when the thread has ended."""
        return self._owner.join(timeout_s)

    async def _run(self, job: Callable[[], Result]) -> Result:
        if self.closed:
            raise TransferError("the KV link is broken")
        return await asyncio.wrap_future(self._owner.submit(job))

    # --- in the owner thread ---

    def _map(self, reply: LinkReply, layout: KvLayout, kv_slice: KvSlice) -> None:
        fd = fetch_descriptor(reply.socket_name, reply.nonce)
        try:
            mapped = map_read_only(fd, layout.pool_bytes)
        finally:
            os.close(fd)
        sample = mapped[:_PROBE_BYTES]
        copied = torch.empty_like(sample)
        copied.copy_(sample)  # the first touch of memory is slow, and is no part of a transfer
        started_s = time.perf_counter()
        copied.copy_(sample)
        self.bytes_per_s = len(sample) / (time.perf_counter() - started_s)
        self._source = PoolView.over(mapped, layout, kv_slice).block_views()

    def _unmap(self) -> None:
        self._source = None

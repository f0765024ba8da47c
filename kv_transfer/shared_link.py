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
from tandem.core.transfer import LinkReply, Portion
from tandem.kv_transfer.blocks import Gate, Pieces, PoolView, Window, copy_blocks, gather_checksum
from tandem.kv_transfer.descriptors import fetch_descriptor
from tandem.kv_transfer.owner_thread import OwnerThread
from tandem.kv_transfer.pool import map_read_only

_MEASURED_BYTES = 16 << 20

Result = TypeVar("Result")


class UnreachableMemoryError(TransferError):
    """One host and one user, and yet the pool cannot be mapped: another network namespace, for example."""


class SharedLink:
    """Its methods are called on the event loop; its jobs run in its thread, which alone holds the mapping.

    A source that dies leaves its memory readable, so a copy never fails half-way; whether the blocks were still the
    right ones is for the acknowledgement to say.
    """

    def __init__(self, owner: OwnerThread) -> None:
        self._owner = owner
        self._source: Pieces | None = None
        self.dead = False
        self.bytes_per_s = 0.0

    @classmethod
    async def open(cls, reply: LinkReply, layout: KvLayout, portion: Portion, name: str) -> "SharedLink":
        """`layout` and `portion` are of the source's pool. Raises UnreachableMemoryError."""
        link = cls(OwnerThread.start(name))
        try:
            await link._run(partial(link._map, reply, layout, portion))
        except BaseException as error:
            link.kill()
            if isinstance(error, TransferError | OSError):
                raise UnreachableMemoryError("the prefill worker's memory cannot be mapped from here") from error
            raise
        return link

    async def copy(
        self,
        source_ids: Sequence[int],
        destination: Pieces,
        destination_ids: Sequence[int],
        gate: Gate,
    ) -> None:
        """Copy blocks of the source's pool to `destination`. Raises TransferError when the gate was closed before
        the end."""

        def job() -> None:
            if self._source is None:
                raise TransferError("the KV link is broken")
            copy_blocks(self._source, source_ids, destination, destination_ids, gate)

        await self._run(job)

    async def checksum(self, view: PoolView, block_ids: Sequence[int], plan: Sequence[Window]) -> int:
        """CRC-32 of blocks that have been copied."""
        return await self._run(lambda: gather_checksum(view, block_ids, plan))

    def kill(self) -> None:
        """Unmap the source after what is under way. Does not wait."""
        if not self.dead:
            self.dead = True
            self._owner.submit(self._unmap)
            self._owner.stop()

    def join(self, timeout_s: float) -> bool:
        """After `kill`: True when the thread has ended."""
        return self._owner.join(timeout_s)

    async def _run(self, job: Callable[[], Result]) -> Result:
        if self.dead:
            raise TransferError("the KV link is broken")
        return await asyncio.wrap_future(self._owner.submit(job))

    # --- in the owner thread ---

    def _map(self, reply: LinkReply, layout: KvLayout, portion: Portion) -> None:
        fd = fetch_descriptor(reply.socket_name, reply.nonce)
        try:
            mapped = map_read_only(fd, layout.pool_bytes)
        finally:
            os.close(fd)
        sample = mapped[:_MEASURED_BYTES]
        copied = torch.empty_like(sample)
        copied.copy_(sample)  # the first touch of memory is slow, and not what a hand-over will see
        started_s = time.perf_counter()
        copied.copy_(sample)
        self.bytes_per_s = len(sample) / (time.perf_counter() - started_s)
        self._source = PoolView.over(mapped, layout, portion).pieces()

    def _unmap(self) -> None:
        self._source = None

"""Decode's end of a link on one host: the pools of the prefill worker's ranks, mapped read-only, and a thread to copy
from them."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from tandem.core.errors import TransferError
from tandem.core.kv_frontier import TransferChunk
from tandem.core.transfer import LinkReply
from tandem.kv_transfer.arrival import ArrivingBlocks, PairPlan, copy_by_pieces, copy_units
from tandem.kv_transfer.blocks import BlockViews, PoolView, copy_blocks
from tandem.kv_transfer.descriptors import fetch_descriptor
from tandem.kv_transfer.fence import WriteFence
from tandem.kv_transfer.owner_thread import OwnerThread
from tandem.kv_transfer.pool import map_read_only
from tandem.kv_transfer.reshard import within

_PROBE_BYTES = 16 << 20
# Copied on the event loop, which takes about 0.1 ms; the way to the thread and back takes longer. torch may divide
# a copy among threads of its own, so this is for the engine's kernel.
INLINE_BYTES = 256 << 10

Result = TypeVar("Result")


class UnreachableMemoryError(TransferError):
    """Both workers have one host and one user, but the pool cannot be mapped (another network namespace, say)."""


class _Copy(NamedTuple):
    """From a slice of a source rank's pool to one of an own rank's, with these `layers` of the model. `blocks` is for
    whole blocks with all of the slice's layers, where torch copies; `words` for any part."""

    layers: range
    blocks: tuple[BlockViews, BlockViews] | None
    words: tuple[torch.Tensor, torch.Tensor]


class SharedMemoryLink:
    """Its methods are called on the event loop; its jobs run in its thread, except for copies of little KV.

    The memory of a prefill worker that dies stays readable, so a copy never fails half-way. Only the acknowledgement
    says whether the blocks held the right KV during the copy.
    """

    def __init__(self, owner: OwnerThread, plan: PairPlan) -> None:
        self._owner = owner
        self._plan = plan
        self._copies: list[_Copy] | None = None
        self.closed = False
        self.bytes_per_s = 0.0  # measured when the link was made

    @classmethod
    async def open(cls, reply: LinkReply, plan: PairPlan, name: str) -> "SharedMemoryLink":
        """Raises UnreachableMemoryError."""
        link = cls(OwnerThread.start(name), plan)
        try:
            await link._run(partial(link._map, reply))
        except BaseException as error:
            link.close()
            if isinstance(error, TransferError | OSError):
                raise UnreachableMemoryError("the prefill worker's memory cannot be mapped from here") from error
            raise
        return link

    async def copy(
        self,
        source_ids: Sequence[int],
        block_ids: Sequence[int],
        num_tokens: int,
        parts: Sequence[TransferChunk],
        fence: WriteFence,
    ) -> None:
        """Copy parts of the blocks of `num_tokens` tokens from all ranks of the source to all own ranks. The parts have
        layers of the model and positions in `source_ids`. Raises TransferError once the fence is closed."""

        def job() -> None:
            if self._copies is None:
                raise TransferError("the KV link is broken")
            for copy in self._copies:
                for part in parts:
                    self._copy_part(copy, source_ids, block_ids, num_tokens, part, fence)

        layout, copy_pieces = self._plan.pools.layout, self._plan.pools.copy_pieces
        if copy_pieces is not None and not self.closed and len(block_ids) * layout.block_bytes <= INLINE_BYTES:
            job()  # `close`, after which the thread unmaps, is called on the event loop, too
        else:
            await self._run(job)

    async def checksum(self, arriving: ArrivingBlocks) -> int:
        """CRC-32 of blocks that have been copied. Raises TransferError."""
        return await self._run(arriving.checksum)

    def close(self) -> None:
        """Unmap the source's pools after the job under way. Does not wait."""
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

    def _copy_part(
        self,
        copy: _Copy,
        source_ids: Sequence[int],
        block_ids: Sequence[int],
        num_tokens: int,
        part: TransferChunk,
        fence: WriteFence,
    ) -> None:
        layers = within(part.layers, copy.layers)
        if not layers:
            return
        resharding, copy_pieces = self._plan.resharding, self._plan.pools.copy_pieces
        if copy.blocks is not None and len(layers) == len(copy.layers):
            some = slice(part.blocks.start, part.blocks.stop)
            copy_blocks(copy.blocks[0], source_ids[some], copy.blocks[1], block_ids[some], fence)
            return
        source, target = (words[layers.start : layers.stop] for words in copy.words)
        units = resharding.units_of(part.blocks, num_tokens)
        if copy_pieces is not None:
            copy_by_pieces(copy_pieces, source, source_ids, target, block_ids, resharding, units, fence)
        else:
            copy_units(source, source_ids, target, block_ids, resharding, units, fence)

    def _map(self, reply: LinkReply) -> None:
        plan, copies = self._plan, []
        for read, targets in zip(plan.resharding.reads, plan.targets, strict=True):
            mapped = self._map_pool(reply, read.rank)
            for write, target in zip(read.writes, targets, strict=True):
                assert isinstance(target, PoolView), "this link is not offered with ranks on other hosts"
                layout, units = plan.source.pool_of(read.rank), plan.resharding.source_units
                source = PoolView.over(mapped, layout, write.source, units)
                blocks = None
                if plan.resharding.copies_whole_blocks and plan.pools.copy_pieces is None:
                    blocks = source.block_views(), plan.pools.block_views(write.rank, write.destination)
                first = plan.source.layers(read.rank).start
                layers = range(first + write.source.layer_begin, first + write.source.layer_end)
                copies.append(_Copy(layers, blocks, (source.words, target.words)))
        self._copies = copies

    def _map_pool(self, reply: LinkReply, rank: int) -> torch.Tensor:
        fd = fetch_descriptor(reply.socket_name, reply.nonces[rank])
        try:
            mapped = map_read_only(fd, self._plan.source.pool_of(rank).pool_bytes)
        finally:
            os.close(fd)
        if not self.bytes_per_s:
            sample = mapped[:_PROBE_BYTES]
            copied = torch.empty_like(sample)
            copied.copy_(sample)  # the first touch of memory is slow, and is no part of a transfer
            started_s = time.perf_counter()
            copied.copy_(sample)
            self.bytes_per_s = len(sample) / (time.perf_counter() - started_s)
        return mapped

    def _unmap(self) -> None:
        self._copies = None

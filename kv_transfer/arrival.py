"""Where KV that comes in is written: blocks of this instance's ranks, which may be divided otherwise than the source's.

All of it runs in the calling thread; `PairPlan` and `OwnPools` are made on the event loop, once for a link.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.core.errors import TransferError
from tandem.core.kv_codec import KvCodec
from tandem.core.kv_frontier import TransferChunk
from tandem.core.kv_layout import KvLayout
from tandem.kv_transfer.block_coder import BlockCoder, KvCodes
from tandem.kv_transfer.blocks import FENCED_BYTES, MAX_VIEW_WORDS, BlockViews, ChunkedBlocks, PoolView, crc32
from tandem.kv_transfer.fence import WriteFence
from tandem.kv_transfer.places import Places, put, take, unit_places
from tandem.kv_transfer.remote_pool import RemotePool, RemoteView, view_over
from tandem.kv_transfer.reshard import KvSlice, RankRead, Resharding, overlap, places, within

_KEPT_VIEWS = 32  # slices of the own pools whose block views are kept; a shape of peers needs a few


Offsets = NDArray[np.int64]
CopyPieces = Callable[[int, Offsets, int, Offsets, int], None]
Target = PoolView | RemoteView


class OwnPools:
    """The pools of this instance's ranks, and views over them.

    `copy_pieces(target, target_offsets, source, source_offsets, piece_bytes)` copies pieces of memory in one call
    without the interpreter lock; None: torch copies.
    """

    def __init__(
        self, layout: KvLayout, pools: Sequence[Tensor | RemotePool], copy_pieces: CopyPieces | None = None
    ) -> None:
        """The first pool is in this process's memory."""
        assert len(pools) == layout.num_ranks, "one pool per rank"
        assert isinstance(pools[0], Tensor)
        self.layout = layout
        self.copy_pieces = copy_pieces
        self.device = pools[0].device
        self.are_here = all(isinstance(pool, Tensor) for pool in pools)
        self._pools = pools
        make_block_views = lru_cache(_KEPT_VIEWS)(partial(_block_views, layout, pools))
        self.block_views: Callable[[int, KvSlice], BlockViews] = make_block_views  # of a slice of one rank's pool

    def view(self, rank: int, kv_slice: KvSlice, units: int) -> Target:
        """A slice of one rank's pool, its blocks divided into `units`."""
        return view_over(self._pools[rank], self.layout.pool_of(rank), kv_slice, units)


def _block_views(layout: KvLayout, pools: Sequence[Tensor | RemotePool], rank: int, kv_slice: KvSlice) -> BlockViews:
    view = view_over(pools[rank], layout.pool_of(rank), kv_slice)
    assert isinstance(view, PoolView), "blocks of other hosts are not copied from shared memory"
    return view.block_views()


@dataclass(frozen=True, slots=True)
class PairPlan:
    """What is fixed for all transfers from one source instance. `targets[i][j]` is where the bytes of
    `resharding.reads[i].writes[j]` go in the own pools; `coders[i]` is for the blocks of `resharding.reads[i]`, None
    where the link has no codec."""

    source: KvLayout
    resharding: Resharding
    pools: OwnPools
    targets: tuple[tuple[Target, ...], ...]
    coders: tuple[BlockCoder | None, ...]

    @classmethod
    def make(
        cls, source: KvLayout, pools: OwnPools, codec: KvCodec = KvCodec.NONE, codes: KvCodes | None = None
    ) -> "PairPlan":
        """`codes`: see `BlockCoder`."""
        resharding = Resharding.between(source, pools.layout)
        targets = tuple(
            tuple(pools.view(write.rank, write.destination, resharding.destination_units) for write in read.writes)
            for read in resharding.reads
        )
        coders = tuple(
            None if codec is KvCodec.NONE else BlockCoder(codec, source.pool_of(read.rank), codes)
            for read in resharding.reads
        )
        return cls(source, resharding, pools, targets, coders)

    def whole(self, num_tokens: int) -> TransferChunk:
        """All of a transfer of that many tokens: the model's layers, and the blocks of the source."""
        return TransferChunk(range(self.source.num_layers), range(self.source.blocks_for(num_tokens)))

    def arriving(
        self, block_ids: Sequence[int], num_tokens: int, max_chunk_bytes: int, part: TransferChunk | None = None
    ) -> "list[ArrivingBlocks]":
        """The blocks that arrive by each read: of a complete transfer, or of `part`, in layers of the model and blocks
        of the source."""
        part = part or self.whole(num_tokens)
        return [
            ArrivingBlocks(self, read, targets, block_ids, num_tokens, max_chunk_bytes, part, coder)
            for read, targets, coder in zip(self.resharding.reads, self.targets, self.coders, strict=True)
            if overlap(part.layers, self.source.layers(read.rank))
        ]


class ArrivingBlocks(ChunkedBlocks):
    """The blocks of one read, as they come from the source, and the slices of the own pools to which they go.
    `block_ids` are the own blocks of all `num_tokens` tokens. Of these comes `part`, in layers of the model and blocks
    of the source."""

    def __init__(
        self,
        plan: PairPlan,
        read: RankRead,
        targets: Sequence[Target],
        block_ids: Sequence[int],
        num_tokens: int,
        max_chunk_bytes: int,
        part: TransferChunk,
        coder: BlockCoder | None,
    ) -> None:
        held = TransferChunk(within(part.layers, plan.source.layers(read.rank)), part.blocks)
        super().__init__(held, plan.source.pool_of(read.rank), num_tokens, max_chunk_bytes, coder)
        self.read = read
        self.part = part
        self._targets = targets
        self._resharding = plan.resharding
        self._block_ids = block_ids
        self._device = plan.pools.device
        self._word = targets[0].word

    def unpack(self, chunk: TransferChunk, received: Tensor, scratch: Tensor) -> Tensor:
        """A chunk's bytes in memory, of what was sent: `received` itself, or in the front of `scratch`."""
        if (coder := self.coder_of(chunk)) is None:
            return received
        raw = scratch[: self.chunk_bytes(chunk)]
        coder.decode(received, raw, len(chunk.layers))
        return raw

    def scatter(self, chunk: TransferChunk, part: Tensor) -> None:
        """Copy a chunk's bytes, as they are in memory, into the own blocks."""
        theirs, ours = self._places(chunk)
        for _, received, target, layers in self._targets_of(chunk, part):
            target.put(layers, ours, received if theirs.units is None else take(received, theirs))

    def checksum(self) -> int:
        """CRC-32 of what is in the own blocks, as `LeavingBlocks.checksum` has it of the source's. Raises TransferError
        when replicas of a head differ."""
        staging = torch.empty(self.staging_bytes, dtype=torch.uint8, device=self._device)
        value = 0
        for chunk in self.chunks:
            part = staging[: self.chunk_bytes(chunk)]
            theirs, ours = self._places(chunk)
            seen: set[KvSlice] = set()
            for kv_slice, copied, target, layers in self._targets_of(chunk, part):
                assert isinstance(target, PoolView), "ranks on other hosts have no shared memory to be checked"
                arrived = take(target.words[layers], ours)
                if kv_slice not in seen:
                    seen.add(kv_slice)
                    put(copied, theirs, arrived)
                elif not torch.equal(take(copied, theirs), arrived):
                    raise TransferError("the KV that arrived differs between ranks that hold the same heads")
            self.clear_unused_slots(chunk, part)
            value = crc32(part, value)
        return value

    def _targets_of(self, chunk: TransferChunk, part: Tensor) -> Iterator[tuple[KvSlice, Tensor, Target, slice]]:
        """For each target that has layers of the chunk: its slice of the source, the same of `part`, and the target
        with its layers."""
        units = self._resharding.source_units
        shape = (len(chunk.layers), 2, len(chunk.blocks), self._layout.num_kv_heads, units, -1)
        received = part.view(self._word).view(shape)
        for write, target in zip(self.read.writes, self._targets, strict=True):
            kv_slice = write.source
            layers = overlap(chunk.layers, range(kv_slice.layer_begin, kv_slice.layer_end))
            if layers:
                theirs = slice(layers.start - chunk.layers.start, layers.stop - chunk.layers.start)
                ours = slice(layers.start - kv_slice.layer_begin, layers.stop - kv_slice.layer_begin)
                heads = slice(kv_slice.head_begin, kv_slice.head_end)
                yield kv_slice, received[theirs, :, :, heads], target, ours

    def _places(self, chunk: TransferChunk) -> tuple[Places, Places]:
        """Places of the chunk's units: in the chunk, and in the own blocks."""
        theirs, ours = self._all_places
        there = self._resharding.units_of(chunk.blocks, self.num_tokens)
        units = slice(there.start, there.stop)
        return theirs.some(units).minus(chunk.blocks.start), ours.some(units)

    @cached_property
    def _all_places(self) -> tuple[Places, Places]:
        """Places of all units of the transfer: in the arriving blocks, by number, and in the own blocks."""
        resharding = self._resharding
        units = range(resharding.num_units(self.num_tokens))
        theirs = unit_places(units, resharding.source_units, range(self.num_blocks), self._device)
        ours = unit_places(units, resharding.destination_units, self._block_ids, self._device)
        if resharding.copies_whole_blocks:
            return Places(theirs.blocks, None), Places(ours.blocks, None)
        return theirs, ours


def copy_units(
    source: Tensor,
    source_ids: Sequence[int],
    target: Tensor,
    block_ids: Sequence[int],
    resharding: Resharding,
    units: range,
    fence: WriteFence,
) -> None:
    """Copy units of a sequence's tokens between blocks that may have different sizes, both in words as in `PoolView`.
    Raises TransferError once the fence is closed.

    As `copy_blocks`, but the views are made for this copy: all those of a pool would be too many.
    """
    words_of_layer = source[0, :, 0, :, 0].numel()
    layer_step = max(1, MAX_VIEW_WORDS // words_of_layer)
    groups = [slice(layer, layer + layer_step) for layer in range(0, len(source), layer_step)]
    unit_step = max(1, FENCED_BYTES // (len(source) * words_of_layer * source.itemsize))
    for first in range(0, len(units), unit_step):
        some = units[first : first + unit_step]
        sources = _unit_views(source, groups, source_ids, places(some, resharding.source_units))
        targets = _unit_views(target, groups, block_ids, places(some, resharding.destination_units))
        with fence.writing():
            torch._foreach_copy_(targets, sources)


def copy_by_pieces(
    copy: CopyPieces,
    source: Tensor,
    source_ids: Sequence[int],
    target: Tensor,
    block_ids: Sequence[int],
    resharding: Resharding,
    units: range,
    fence: WriteFence,
) -> None:
    """As `copy_units`, with `copy`. A piece is a unit of one head, or of all heads where units are whole blocks."""
    heads = source.shape[3] if resharding.copies_whole_blocks else 1
    piece_bytes = heads * source.shape[-1] * source.itemsize
    theirs, ours = (_piece_rows(words, resharding.copies_whole_blocks) for words in (source, target))
    unit_step = max(1, FENCED_BYTES // (len(theirs) * piece_bytes))
    for first in range(0, len(units), unit_step):
        some = units[first : first + unit_step]
        from_offsets = _piece_offsets(source, theirs, source_ids, places(some, resharding.source_units))
        to_offsets = _piece_offsets(target, ours, block_ids, places(some, resharding.destination_units))
        with fence.writing():
            copy(target.data_ptr(), to_offsets, source.data_ptr(), from_offsets, piece_bytes)


def _piece_rows(words: Tensor, whole_blocks: bool) -> Offsets:
    """Bytes from the begin of `words` to each of its rows: [layer, kv], or [layer, kv, head]."""
    layer, kv, _, head, *_ = (step * words.itemsize for step in words.stride())
    rows = np.add.outer(np.arange(words.shape[0]) * layer, np.arange(2) * kv)
    return (rows if whole_blocks else np.add.outer(rows, np.arange(words.shape[3]) * head)).ravel()


def _piece_offsets(
    words: Tensor, rows: Offsets, block_ids: Sequence[int], at: tuple[Sequence[int], Sequence[int]]
) -> Offsets:
    """Byte offset of each unit in each row."""
    positions, numbers = at
    blocks = np.array([block_ids[position] for position in positions], dtype=np.int64)
    block, unit = (words.stride(dim) * words.itemsize for dim in (2, 4))
    offsets: Offsets = np.add.outer(rows, blocks * block + np.array(numbers, dtype=np.int64) * unit).ravel()
    return offsets


def _unit_views(
    words: Tensor, groups: Sequence[slice], block_ids: Sequence[int], at: tuple[Sequence[int], Sequence[int]]
) -> list[Tensor]:
    """A view of each unit in each group of layers."""
    return [
        some.select(2, block_ids[position]).select(3, number)
        for some in (words[layers] for layers in groups)
        for position, number in zip(*at, strict=True)
    ]

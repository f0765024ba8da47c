"""Which bytes of which source rank's blocks go to which bytes of which destination rank's blocks. Pure.

The two sides may divide the model's layers and KV heads over other numbers of ranks, in other ranges, and their blocks
may have other sizes. Two questions are independent of each other, so there are two answers:

    layers and heads   `reads`: rectangles [layers, heads] of the ranks' pools; the same for every transfer of a pair
    tokens             `unit_tokens`: tokens move in units that lie within one block on both sides; see `places`

Every element that the destination holds is written once. Of replicas of a head one is read, once, for all ranks of the
destination that hold the head.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tandem.core.kv_layout import KvLayout


@dataclass(frozen=True, slots=True)
class KvSlice:
    """The layers [layer_begin, layer_end) and KV heads [head_begin, head_end) of one rank's pool, counted there."""

    layer_begin: int
    layer_end: int
    head_begin: int
    head_end: int


@dataclass(frozen=True, slots=True)
class RankWrite:
    """`source` of the pool that is read goes to `destination` of the pool of the destination's rank `rank`; both slices
    have one shape."""

    source: KvSlice
    rank: int
    destination: KvSlice


@dataclass(frozen=True, slots=True)
class RankRead:
    """The pool of the source's rank `rank` is read once, for all `writes`."""

    rank: int
    writes: tuple[RankWrite, ...]


@dataclass(frozen=True, slots=True)
class Resharding:
    """How KV gets from an instance with one layout to an instance with another. Made once for a pair of instances.

    A unit has `unit_tokens` consecutive tokens; a block of the source has `source_units`, one of the destination
    `destination_units`.
    """

    reads: tuple[RankRead, ...]
    unit_tokens: int
    source_units: int
    destination_units: int

    @classmethod
    def between(cls, source: KvLayout, destination: KvLayout) -> "Resharding":
        """The two layouts are of one model: their fingerprints are equal."""
        assert (source.num_layers, source.num_kv_heads) == (destination.num_layers, destination.num_kv_heads)
        unit_tokens = math.gcd(source.block_size, destination.block_size)
        return cls(
            reads=tuple(_reads(source, destination)),
            unit_tokens=unit_tokens,
            source_units=source.block_size // unit_tokens,
            destination_units=destination.block_size // unit_tokens,
        )

    @property
    def copies_whole_blocks(self) -> bool:
        """Whether blocks have one size on both sides."""
        return self.source_units == self.destination_units == 1

    def num_units(self, num_tokens: int) -> int:
        """Units that hold the first `num_tokens` tokens; the last one may have slots after the last token."""
        return -(-num_tokens // self.unit_tokens)

    def units_of(self, blocks: range, num_tokens: int) -> range:
        """The units in those blocks of the source, which are positions in a sequence of `num_tokens` tokens."""
        last = min(blocks.stop * self.source_units, self.num_units(num_tokens))
        return range(blocks.start * self.source_units, last)


def places(units: range, units_per_block: int) -> tuple[list[int], list[int]]:
    """For each unit of a sequence: the position of its block in the sequence's list of blocks, and the number of the
    unit in that block, on a side whose blocks have `units_per_block` units."""
    return [unit // units_per_block for unit in units], [unit % units_per_block for unit in units]


def overlap(left: range, right: range) -> range:
    """The intersection of two ranges of step 1; it may be empty."""
    return range(max(left.start, right.start), min(left.stop, right.stop))


def within(layers: range, held: range) -> range:
    """The layers that are in both ranges, counted from the first of `held`."""
    common = overlap(layers, held)
    return range(common.start - held.start, common.stop - held.start)


def _reads(source: KvLayout, destination: KvLayout) -> Iterator[RankRead]:
    """One for each source rank but for replicas. Each is of all that the rank holds, since the destination as a whole
    needs everything."""
    for rank in range(source.num_ranks):
        is_replica = rank % source.tp > 0 and source.heads(rank) == source.heads(rank - 1)
        if not is_replica:
            yield RankRead(rank, tuple(_writes(source.layers(rank), source.heads(rank), destination)))


def _writes(layers: range, heads: range, destination: KvLayout) -> Iterator[RankWrite]:
    for rank in range(destination.num_ranks):
        held_layers, held_heads = destination.layers(rank), destination.heads(rank)
        common_layers, common_heads = overlap(layers, held_layers), overlap(heads, held_heads)
        if common_layers and common_heads:
            source = _slice(common_layers, common_heads, layers, heads)
            yield RankWrite(source, rank, _slice(common_layers, common_heads, held_layers, held_heads))


def _slice(layers: range, heads: range, of_layers: range, of_heads: range) -> KvSlice:
    """Ranges of the model, as counted in the pool of a rank that holds `of_*`."""
    return KvSlice(
        layer_begin=layers.start - of_layers.start,
        layer_end=layers.stop - of_layers.start,
        head_begin=heads.start - of_heads.start,
        head_end=heads.stop - of_heads.start,
    )

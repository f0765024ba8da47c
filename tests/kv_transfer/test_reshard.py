"""Every byte that a destination holds is written once, from where the source really has it, and replicas are read once.

Every combination of ranks, heads and block sizes that the planner can make; the destination's stages have other layers
than the source's.
"""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.kv_layout import KvLayout
from tandem.core.parallel import layers_of
from tandem.kv_transfer.reshard import KvSlice, Resharding, places

NUM_LAYERS = 7
NUM_TOKENS = 131  # no multiple of a block size
NUM_BLOCKS = 20
TP, PP, HEADS, BLOCK_SIZES = (1, 2, 3, 4, 8), (1, 2, 3, 4), (1, 2, 3, 4, 8), (8, 16, 32, 64)
BLOCK_SIZE_PAIRS = list(itertools.product(BLOCK_SIZES, BLOCK_SIZES))
RANKS = list(itertools.product(TP, PP, TP, PP, HEADS))
SOURCE_HEAD_COST, DESTINATION_HEAD_COST = 0.2, 2.5  # of the output head, in layers


def layout(heads: int, tp: int, pp: int, head_cost: float, block_size: int = 16) -> KvLayout:
    stages = tuple(len(layers_of(NUM_LAYERS, pp, stage, head_cost)) for stage in range(pp))
    return KvLayout(NUM_LAYERS, NUM_BLOCKS, heads, block_size, 1, "bfloat16", "w", tp=tp, layers_per_stage=stages)


def pair(ranks: tuple[int, int, int, int, int], sizes: tuple[int, int] = (16, 16)) -> tuple[KvLayout, KvLayout]:
    tp, pp, other_tp, other_pp, heads = ranks
    source = layout(heads, tp, pp, SOURCE_HEAD_COST, sizes[0])
    return source, layout(heads, other_tp, other_pp, DESTINATION_HEAD_COST, sizes[1])


def elements(of: KvLayout, rank: int) -> np.ndarray:
    """[layer, head] of one rank's pool: which of the model's layers and heads each is."""
    return np.add.outer(np.array(of.layers(rank)) * 100, np.array(of.heads(rank)))


def area(kv_slice: KvSlice) -> tuple[slice, slice]:
    return slice(kv_slice.layer_begin, kv_slice.layer_end), slice(kv_slice.head_begin, kv_slice.head_end)


@pytest.mark.parametrize("heads", HEADS)
def test_every_layer_and_head_is_written_once_from_the_right_place(heads: int) -> None:
    for ranks in (ranks for ranks in RANKS if ranks[4] == heads):
        source, destination = pair(ranks)
        wanted = [elements(destination, rank) for rank in range(destination.num_ranks)]
        arrived = [np.full_like(each, -1) for each in wanted]
        num_writes = [np.zeros_like(each) for each in wanted]
        for read in Resharding.between(source, destination).reads:
            held = elements(source, read.rank)
            for write in read.writes:
                arrived[write.rank][area(write.destination)] = held[area(write.source)]
                num_writes[write.rank][area(write.destination)] += 1
        assert all(map(np.array_equal, arrived, wanted)), ranks
        assert all((each == 1).all() for each in num_writes), ranks


@pytest.mark.parametrize("heads", HEADS)
def test_each_layer_and_head_is_read_once_though_there_are_replicas(heads: int) -> None:
    for ranks in (ranks for ranks in RANKS if ranks[4] == heads):
        source, destination = pair(ranks)
        read = [elements(source, read.rank).ravel() for read in Resharding.between(source, destination).reads]
        assert sorted(np.concatenate(read)) == [
            layer * 100 + head for layer in range(NUM_LAYERS) for head in range(heads)
        ]


def test_equal_shapes_of_one_rank_are_one_copy_of_whole_blocks() -> None:
    source, destination = pair((1, 1, 1, 1, 4))
    resharding = Resharding.between(source, destination)
    ((write,),) = (read.writes for read in resharding.reads)
    assert write.source == write.destination == KvSlice(0, NUM_LAYERS, 0, 4)
    assert resharding.copies_whole_blocks


def test_equal_shapes_of_several_ranks_are_one_copy_a_rank() -> None:
    one = layout(8, tp=4, pp=3, head_cost=1.0)
    assert all(len(read.writes) == 1 for read in Resharding.between(one, one).reads)


# --- tokens ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(256)
def pools_of(of: KvLayout, block_ids: tuple[int, ...]) -> list[np.ndarray]:
    """[layer, kv, block, head, slot] of each rank: a number of its own for everything that is cached for a token; -1
    where no token is. To be read only."""
    tokens = np.arange(NUM_TOKENS)
    blocks, slots = np.array(block_ids)[tokens // of.block_size], tokens % of.block_size
    pools = []
    for rank in range(of.num_ranks):
        pool = np.full(of.pool_of(rank).shape[:5], -1, np.int32)
        for kv in range(2):
            numbers = np.add.outer(tokens * 2000, elements(of, rank) * 2 + kv)  # [token, layer, head]
            pool[:, kv, blocks, :, slots] = numbers
        pools.append(pool)
    return pools


def by_unit(pool: np.ndarray, units: int) -> np.ndarray:
    """[layer, kv, head, block, unit, slot]"""
    layers, kv, blocks, heads, slots = pool.shape
    return pool.reshape(layers, kv, blocks, heads, units, slots // units).transpose(0, 1, 3, 2, 4, 5)


def check_tokens(ranks: tuple[int, int, int, int, int], sizes: tuple[int, int]) -> None:
    """What `Resharding` says, done with plain indexing, gives the pools that the destination itself would have filled;
    no slot is written twice."""
    source, destination = pair(ranks, sizes)
    theirs = tuple(range(NUM_BLOCKS))[::-1][: source.blocks_for(NUM_TOKENS)]
    ours = tuple(range(1, 1 + destination.blocks_for(NUM_TOKENS)))
    resharding = Resharding.between(source, destination)
    held, wanted = pools_of(source, theirs), pools_of(destination, ours)
    arrived = [np.full_like(pool, -1) for pool in wanted]
    num_writes = [np.zeros_like(pool) for pool in wanted]
    units = range(resharding.num_units(NUM_TOKENS))
    from_position, from_unit = places(units, resharding.source_units)
    to_position, to_unit = places(units, resharding.destination_units)
    take = (slice(None), slice(None), slice(None), np.array(theirs)[from_position], from_unit)
    put = (slice(None), slice(None), slice(None), np.array(ours)[to_position], to_unit)
    for read in resharding.reads:
        of_source = by_unit(held[read.rank], resharding.source_units)
        for write in read.writes:
            (from_layers, from_heads), (to_layers, to_heads) = area(write.source), area(write.destination)
            values = of_source[from_layers, :, from_heads][take]
            by_unit(arrived[write.rank], resharding.destination_units)[to_layers, :, to_heads][put] = values
            by_unit(num_writes[write.rank], resharding.destination_units)[to_layers, :, to_heads][put] += 1
    assert all(map(np.array_equal, arrived, wanted))
    for pool, count in zip(wanted, num_writes, strict=True):
        assert count.max() == 1
        assert (count[pool >= 0] == 1).all()


@pytest.mark.parametrize("sizes", BLOCK_SIZE_PAIRS)
def test_every_token_is_written_once_whatever_the_block_sizes(sizes: tuple[int, int]) -> None:
    check_tokens((2, 2, 3, 1, 3), sizes)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(RANKS), st.integers(1, 65), st.integers(1, 65))
def test_block_sizes_need_not_divide_each_other(ranks: tuple[int, int, int, int, int], one: int, other: int) -> None:
    if min(one, other) * NUM_BLOCKS > NUM_TOKENS + max(one, other):
        check_tokens(ranks, (one, other))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sizes", BLOCK_SIZE_PAIRS)
def test_every_combination(sizes: tuple[int, int]) -> None:
    for ranks in RANKS:
        check_tokens(ranks, sizes)

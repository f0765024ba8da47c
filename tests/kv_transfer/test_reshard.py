"""Every element a destination rank holds is written once, from where the source really has it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.transfer import KvSlice
from tandem.kv_transfer.reshard import KvSharding, plan_copies


@st.composite
def grids(draw: st.DrawFn) -> tuple[KvSharding, KvSharding]:
    layers, heads = draw(st.integers(1, 12)), draw(st.integers(1, 8))

    def grid() -> KvSharding:
        return KvSharding(layers, heads, tp=draw(st.integers(1, 10)), pp=draw(st.integers(1, min(layers, 6))))

    return grid(), grid()


def pool_of(grid: KvSharding, rank: int) -> torch.Tensor:
    """[layer, head] of one rank; every element names the layer and head of the model that it is."""
    layers, heads = grid.layers(rank), grid.heads(rank)
    return torch.tensor([[layer * 100 + head for head in heads] for layer in layers])


def part(pool: torch.Tensor, kv_slice: KvSlice) -> torch.Tensor:
    return pool[kv_slice.layer_begin : kv_slice.layer_end, kv_slice.head_begin : kv_slice.head_end]


@settings(deadline=None)
@given(grids())
def test_every_element_is_written_once_from_the_right_place(both: tuple[KvSharding, KvSharding]) -> None:
    source, destination = both
    for rank in range(destination.num_ranks):
        wanted = pool_of(destination, rank)
        arrived, writes = torch.full_like(wanted, -1), torch.zeros_like(wanted)
        for copy in plan_copies(source, destination, rank):
            read = part(pool_of(source, copy.source_rank), copy.source)
            assert read.numel() > 0
            part(arrived, copy.destination).copy_(read)
            part(writes, copy.destination).add_(1)
            assert read.shape == part(arrived, copy.destination).shape
        assert torch.equal(arrived, wanted)
        assert bool((writes == 1).all())


@settings(deadline=None)
@given(grids())
def test_the_ranks_hold_the_whole_model(both: tuple[KvSharding, KvSharding]) -> None:
    for grid in both:
        held = {int(element) for rank in range(grid.num_ranks) for element in pool_of(grid, rank).flatten()}
        assert held == {layer * 100 + head for layer in range(grid.num_layers) for head in range(grid.num_kv_heads)}
        if grid.tp <= grid.num_kv_heads:
            assert sum(pool_of(grid, rank).numel() for rank in range(grid.num_ranks)) == len(held)


def test_one_rank_a_side_is_one_copy_of_everything() -> None:
    one = KvSharding(num_layers=4, num_kv_heads=2)
    (copy,) = plan_copies(one, one, 0)
    assert copy.source == copy.destination == KvSlice(0, 4, 0, 2)


def test_replicas_share_the_reading() -> None:
    source, destination = KvSharding(2, 1, tp=4), KvSharding(2, 1, tp=4)
    read = [copy.source_rank for rank in range(4) for copy in plan_copies(source, destination, rank)]
    assert sorted(read) == [0, 1, 2, 3]


def test_uneven_cuts_differ_by_one() -> None:
    grid = KvSharding(num_layers=7, num_kv_heads=5, tp=2, pp=3)
    assert [len(grid.layers(stage * 2)) for stage in range(3)] == [3, 2, 2]
    assert [len(grid.heads(rank)) for rank in range(2)] == [3, 2]

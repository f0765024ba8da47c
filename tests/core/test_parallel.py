"""Ranks divide a model without gaps."""

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.parallel import ParallelShape, RankHosts, kv_heads_of, layers_of, query_heads_of


@given(kv_heads=st.integers(1, 9), shared_by=st.integers(1, 9), data=st.data())
def test_each_query_head_is_on_one_rank_that_has_its_kv_head(
    kv_heads: int, shared_by: int, data: st.DataObject
) -> None:
    heads = kv_heads * shared_by
    tp = data.draw(st.integers(1, heads))
    held = [kv_heads_of(kv_heads, tp, rank) for rank in range(tp)]
    computed = [query_heads_of(heads, kv_heads, tp, rank) for rank in range(tp)]
    assert list(chain.from_iterable(computed)) == list(range(heads))
    for queries, keys in zip(computed, held, strict=True):
        assert len(queries) >= 1
        assert {head // shared_by for head in queries} == set(keys)
        assert len(queries) % len(keys) == 0, "each KV head of a rank serves the same number of its query heads"


@given(layers=st.integers(1, 40), head_cost=st.floats(0, 50), data=st.data())
def test_stages_are_consecutive_and_no_other_division_is_faster(
    layers: int, head_cost: float, data: st.DataObject
) -> None:
    pp = data.draw(st.integers(1, layers))
    stages = [layers_of(layers, pp, stage, head_cost) for stage in range(pp)]
    assert list(chain.from_iterable(stages)) == list(range(layers))
    assert all(stages)
    slowest = max(*(len(stage) for stage in stages[:-1]), len(stages[-1]) + head_cost, 0)
    for last in range(1, layers - pp + 2 if pp > 1 else 1):
        assert slowest <= max(last + head_cost, -(-(layers - last) // (pp - 1)))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_each_rank_is_on_one_host(per_host: list[int]) -> None:
    hosts = RankHosts(ParallelShape(pp=sum(per_host)), tuple(per_host))
    ranks = [list(hosts.ranks_of(host)) for host in range(len(per_host))]
    assert list(chain.from_iterable(ranks)) == list(range(sum(per_host)))
    for host, of_host in enumerate(ranks):
        assert [hosts.host_of(rank) for rank in of_host] == [host] * len(of_host)
        assert hosts.share_host(of_host)
        assert hosts.share_host((0, of_host[-1])) == (host == 0)

import pytest

from tandem.core.session import BlockCounts
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.integrity import check_blocks, count_blocks


def test_a_leak_and_a_stolen_block_are_found() -> None:
    pool = BlockPool(4)
    table = pool.allocate(2)
    check_blocks(pool, [table])
    with pytest.raises(AssertionError, match="1 references and 0 owners"):
        check_blocks(pool, [])
    with pytest.raises(AssertionError, match="1 references and 2 owners"):
        check_blocks(pool, [table, table])


def test_counts_sum_to_the_pool() -> None:
    pool = BlockPool(10)
    running, leased, lost = pool.allocate(3), pool.allocate(2), pool.allocate(1)
    shared = running[:1]
    pool.share(shared)
    cached = pool.allocate(1)
    pool.keep(cached[0])
    pool.release(cached)
    assert count_blocks(pool, [running], [leased + shared]) == BlockCounts(
        total=10, free=3, running=3, cached=1, leased=2, leaked=1
    )
    pool.release(lost)
    assert count_blocks(pool, [running], [leased + shared]).leaked == 0

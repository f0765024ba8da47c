import pytest

from tandem.core.session import BlockCounts
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.integrity import check_blocks, count_blocks


def test_a_leaked_block_and_one_with_two_owners_are_found() -> None:
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
    num_owned = len(running) + len(leased) + len(shared)
    assert count_blocks(pool, num_owned, num_leased=3) == BlockCounts(
        total=10, free=3, running=2, cached=1, leased=3, leaked=1
    )
    pool.release(lost)
    assert count_blocks(pool, num_owned, num_leased=3).leaked == 0


def test_a_lost_reference_to_a_block_with_another_owner_is_a_leak_too() -> None:
    pool = BlockPool(4)
    running = pool.allocate(2)
    pool.share(running[:1])
    assert count_blocks(pool, len(running), num_leased=0) == BlockCounts(
        total=4, free=2, running=1, cached=0, leased=0, leaked=1
    )

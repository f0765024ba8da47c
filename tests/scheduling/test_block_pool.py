import pytest

from tandem.scheduling.block_pool import BlockPool


def test_allocates_each_block_once_and_takes_it_back() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert not pool.can_allocate(1)
    pool.release(first)
    assert (pool.num_free, pool.num_held) == (3, 1)
    pool.check_integrity()


def test_allocating_more_than_is_free_is_refused() -> None:
    with pytest.raises(AssertionError):
        BlockPool(2).allocate(3)


def test_a_shared_block_is_free_after_its_last_release_only() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_free == 0
    pool.release(blocks)
    assert pool.num_free == 1


def test_double_free_and_sharing_a_free_block_are_faults() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share(blocks)


def test_kept_blocks_are_reclaimed_oldest_first_and_a_prefix_last() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for block_id in old + new:
        pool.keep(block_id)
    pool.release(old)
    pool.release(new)
    assert (pool.num_free, pool.num_reclaimable, pool.num_held) == (0, 4, 0)
    assert [pool.reclaim_oldest() for _ in range(4)] == [old[1], old[0], new[1], new[0]]
    assert pool.num_free == 4
    pool.check_integrity()


def test_a_shared_block_is_not_reclaimable() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.keep(blocks[0])
    pool.release(blocks)
    pool.share(blocks)
    assert (pool.num_reclaimable, pool.num_held) == (0, 1)
    pool.forget(blocks[0])
    pool.release(blocks)
    assert pool.num_free == 1

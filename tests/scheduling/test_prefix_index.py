from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.prefix_index import (
    BlocksCached,
    BlocksEvicted,
    CacheCleared,
    PrefixIndex,
    block_hashes,
    extend_block_hashes,
)

_TOKENS = st.lists(st.integers(0, 2), max_size=24)


def _cached(index: PrefixIndex, pool: BlockPool, token_ids: list[int], salt: str = "") -> list[int]:
    """Compute `token_ids` from scratch, cache them, and let the blocks go."""
    table = pool.allocate(-(-len(token_ids) // index.block_size))
    index.insert(token_ids, table, len(token_ids), salt)
    pool.release(table)
    return table


@settings(deadline=None, max_examples=100)
@given(_TOKENS, _TOKENS, st.sampled_from(["", "a"]), st.sampled_from(["", "a"]), st.integers(1, 4))
def test_names_are_equal_exactly_for_equal_prefixes_and_salts(
    one: list[int], two: list[int], salt_one: str, salt_two: str, block_size: int
) -> None:
    names_one, names_two = block_hashes(one, block_size, salt_one), block_hashes(tuple(two), block_size, salt_two)
    assert (len(names_one), len(names_two)) == (len(one) // block_size, len(two) // block_size)
    for i, (name_one, name_two) in enumerate(zip(names_one, names_two, strict=False)):
        end = (i + 1) * block_size
        assert (name_one == name_two) == (one[:end] == two[:end] and salt_one == salt_two)


def test_names_can_be_computed_piecewise() -> None:
    tokens = list(range(20))
    hashes: list[bytes] = []
    for num_blocks in (0, 1, 1, 3, 5):
        extend_block_hashes(hashes, tokens, 4, "s", num_blocks)
    assert hashes == block_hashes(tokens, 4, "s")


def test_finds_the_longest_cached_prefix_but_leaves_a_token_to_compute() -> None:
    pool = BlockPool(8)
    index = PrefixIndex(pool, 4)
    table = _cached(index, pool, list(range(12)))
    assert pool.num_reclaimable == 3
    assert index.match(list(range(12)), "") == table[:2]
    assert index.match(list(range(13)), "") == table
    assert index.match([0, 1, 2, 3, 9, 9, 9, 9, 9], "") == table[:1]
    assert [pool.references(block_id) for block_id in table] == [3, 2, 1]
    assert index.match([0, 1, 2], "") == []


def test_tenants_share_no_blocks() -> None:
    pool = BlockPool(4)
    index = PrefixIndex(pool, 2)
    _cached(index, pool, [1, 2, 3, 4], "tenant a")
    assert index.match([1, 2, 3, 4, 5], "tenant b") == []
    assert index.match([1, 2, 3, 4, 5], "") == []
    assert len(index.match([1, 2, 3, 4, 5], "tenant a")) == 2


def test_evicts_least_recently_used_leaves_first() -> None:
    pool = BlockPool(6)
    index = PrefixIndex(pool, 2)
    old = _cached(index, pool, [1, 1, 2, 2, 3, 3])
    new = _cached(index, pool, [4, 4, 5, 5])
    pool.release(index.match([1, 1, 9], ""))  # its root was used last
    assert index.evict(2) == 2
    assert index.match([1, 1, 2, 2, 3, 3, 0], "") == old[:1]
    assert index.match([4, 4, 5, 5, 0], "") == new
    index.check_integrity()


def test_eviction_is_all_or_nothing_and_spares_held_blocks() -> None:
    pool = BlockPool(4)
    index = PrefixIndex(pool, 2)
    _cached(index, pool, [1, 1, 2, 2])
    held = index.match([1, 1, 0], "")
    assert not index.ensure_free(4)
    assert (pool.num_free, index.num_blocks) == (2, 2)
    assert index.ensure_free(3)
    assert (pool.num_free, index.num_blocks) == (3, 1)
    pool.release(held)
    assert index.ensure_free(4)
    assert index.num_blocks == 0


def test_a_prefix_computed_twice_is_cached_once_and_no_block_follows_the_other_copy() -> None:
    pool = BlockPool(8)
    index = PrefixIndex(pool, 2)
    one, two = pool.allocate(1), pool.allocate(2)
    index.insert([1, 1], one, 2, "")
    index.insert([1, 1, 2, 2], two, 4, "")
    assert index.num_blocks == 1
    index.insert([1, 1, 2, 2], two, 4, "", start=2)
    assert index.num_blocks == 1
    pool.release(two)
    assert pool.num_free == 7
    index.check_integrity()


def test_clear_empties_the_cache_and_frees_unheld_blocks() -> None:
    pool = BlockPool(4)
    index = PrefixIndex(pool, 2)
    _cached(index, pool, [1, 1, 2, 2])
    held = index.match([1, 1, 0], "")
    index.clear()
    assert (index.num_blocks, pool.num_free, pool.num_held) == (0, 3, 1)
    assert index.match([1, 1, 0], "") == []
    pool.release(held)
    assert pool.num_free == 4
    index.check_integrity()


def test_a_disabled_cache_keeps_nothing() -> None:
    pool = BlockPool(4)
    index = PrefixIndex(pool, 2, enabled=False)
    _cached(index, pool, [1, 1, 2, 2])
    assert pool.num_free == 4
    assert index.match([1, 1, 2, 2, 3], "") == []


_CALLS = st.one_of(
    st.tuples(st.just("compute"), _TOKENS, st.sampled_from(["", "a"])),
    st.tuples(st.just("evict"), st.integers(1, 4), st.none()),
    st.tuples(st.just("clear"), st.none(), st.none()),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(_CALLS, max_size=12))
def test_recorded_changes_tell_what_is_cached(calls: list[tuple[str, object, str | None]]) -> None:
    """A subscriber that applies them knows every cached prefix without a salt, and its tokens."""
    pool = BlockPool(16)
    index = PrefixIndex(pool, 2, records_changes=True)
    known: dict[bytes, tuple[bytes | None, tuple[int, ...]]] = {}
    expected: dict[bytes, list[int]] = {}  # names without a salt -> the whole prefix
    for call, argument, salt in calls:
        match call, argument:
            case "compute", list() if index.ensure_free(-(-len(argument) // 2)):
                assert salt is not None
                if not salt:
                    names = block_hashes(argument, 2, "")
                    expected |= {name: argument[: 2 * i + 2] for i, name in enumerate(names)}
                matched = index.match(argument, salt)
                rest = -(-len(argument) // 2) - len(matched)
                if index.ensure_free(rest):
                    table = matched + pool.allocate(rest)
                    index.insert(argument, table, len(argument), salt, start=2 * len(matched))
                    pool.release(table)
                else:
                    pool.release(matched)
            case "evict", int():
                index.evict(argument)
            case "clear", _:
                index.clear()
        for change in index.take_changes():
            match change:
                case BlocksCached(names, parent, token_ids):
                    assert parent is None or parent in known
                    assert len(token_ids) == 2 * len(names)
                    for i, name in enumerate(names):
                        known[name] = (names[i - 1] if i else parent, token_ids[2 * i : 2 * i + 2])
                case BlocksEvicted(names):
                    for name in names:
                        known.pop(name, None)  # one with a salt was never told
                case CacheCleared():
                    known.clear()
        assert known.keys() == {name for name in index._block_of if name in expected}
        for name in known:
            prefix: list[int] = []
            link: bytes | None = name
            while link is not None:
                link, tokens = known[link]
                prefix[:0] = tokens
            assert prefix == expected[name]
    assert PrefixIndex(pool, 2).take_changes() == []

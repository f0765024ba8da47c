from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.scheduling.prefix_index import block_hashes
from tandem.scheduling.prefix_tracker import PrefixTracker

POOL_BLOCKS = 1000  # more than any test records


def test_counts_leading_tokens_seen_by_that_instance() -> None:
    tracker = PrefixTracker(block_size=4, max_blocks_per_instance=100)
    tracker.record("a", block_hashes(list(range(14)), 4, ""), POOL_BLOCKS)
    assert tracker.matched_tokens("a", block_hashes(list(range(20)), 4, "")) == 12
    assert tracker.matched_tokens("a", block_hashes([0, 1, 2, 3, 9, 9, 9, 9], 4, "")) == 4
    assert tracker.matched_tokens("a", block_hashes(list(range(20)), 4, "tenant")) == 0
    assert tracker.matched_tokens("b", block_hashes(list(range(20)), 4, "")) == 0
    tracker.forget("a")
    assert tracker.matched_tokens("a", block_hashes(list(range(20)), 4, "")) == 0


def test_is_bounded_and_drops_the_least_recently_used_end_first() -> None:
    tracker = PrefixTracker(block_size=1, max_blocks_per_instance=5)
    old, new = block_hashes([1, 2, 3, 4], 1, ""), block_hashes([5, 6, 7], 1, "")
    tracker.record("a", old, POOL_BLOCKS)
    tracker.record("a", new, POOL_BLOCKS)
    assert tracker.num_blocks("a") == 5
    assert tracker.matched_tokens("a", old) == 2
    assert tracker.matched_tokens("a", new) == 3
    tracker.record("a", old[:1], POOL_BLOCKS)
    tracker.record("a", block_hashes([8], 1, ""), POOL_BLOCKS)
    assert tracker.matched_tokens("a", old) == 1


def test_an_instance_has_at_most_as_many_names_as_its_pool_has_blocks() -> None:
    tracker = PrefixTracker(block_size=1, max_blocks_per_instance=100)
    names = block_hashes(list(range(10)), 1, "")
    tracker.record("small", names, num_pool_blocks=3)
    tracker.record("large", names, num_pool_blocks=1000)
    assert (tracker.num_blocks("small"), tracker.num_blocks("large")) == (3, 10)
    assert tracker.matched_tokens("small", names) == 3


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.lists(st.integers(0, 1), max_size=8), st.booleans()), max_size=25),
    st.lists(st.integers(0, 1), max_size=8),
)
def test_holders_are_the_instances_with_that_many_matched_tokens(
    recorded: list[tuple[str, list[int], bool]], prompt: list[int]
) -> None:
    tracker = PrefixTracker(block_size=1, max_blocks_per_instance=10)
    for instance_id, recorded_prompt, is_gone in recorded:
        tracker.record(instance_id, block_hashes(recorded_prompt, 1, ""), POOL_BLOCKS)
        if is_gone:
            tracker.forget(instance_id)
    names = block_hashes(prompt, 1, "")
    matched = {instance_id: tracker.matched_tokens(instance_id, names) for instance_id in "abcd"}
    expected = [
        (tokens, {instance_id for instance_id in matched if matched[instance_id] >= tokens})
        for tokens in sorted(set(matched.values()) - {0}, reverse=True)
    ]
    assert list(tracker.holders(names)) == expected

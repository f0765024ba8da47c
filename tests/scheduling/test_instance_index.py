"""The indexes choose what the full comparison of `scheduling.routing` chooses."""

from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.scheduling.decode_index import DecodeIndex, DecodeQuery
from tandem.scheduling.prefill_index import PrefillIndex, PrefillQuery
from tandem.scheduling.prefix_tracker import PrefixTracker
from tandem.scheduling.routing import DecodeView, PrefillView, Scored, Selection, choose_decode, choose_prefill

_BLOCK_SIZE = 10
_SLACK_TOKENS = 25
_PREFILL = PrefillView("a", "f", ready=True, max_model_len=1000, queued_tokens=0)
_DECODE = DecodeView("a", "f", ready=True, max_model_len=99, capacity_tokens=100, claimed_tokens=0, sequences=0)

_IDS = st.sampled_from([f"{letter}{digit}" for letter in "abcdef" for digit in "12345"])
_FAILURES = st.dictionaries(_IDS, st.sampled_from([0.0, 0.01, 0.3, 4.0]), max_size=4)
_PROMPTS = st.lists(st.integers(0, 1), max_size=8)  # a token stands for a block: few prompts, many common prefixes


def _names(prompt: list[int]) -> list[tuple[int, ...]]:
    return [tuple(prompt[: i + 1]) for i in range(len(prompt))]


def _prefill_views(ids: st.SearchStrategy[str]) -> st.SearchStrategy[PrefillView]:
    return st.builds(
        PrefillView,
        instance_id=ids,
        fingerprint=st.sampled_from(["f", "f", "f", "g"]),
        ready=st.sampled_from([True, True, True, False]),
        max_model_len=st.sampled_from([50, 1000, 1000]),
        queued_tokens=st.integers(0, 5).map(lambda tens: 10 * tens),
    )


def _decode_views(ids: st.SearchStrategy[str]) -> st.SearchStrategy[DecodeView]:
    return st.builds(
        DecodeView,
        instance_id=ids,
        fingerprint=st.sampled_from(["f", "f", "f", "g"]),
        ready=st.sampled_from([True, True, True, False]),
        max_model_len=st.sampled_from([50, 99, 99]),
        capacity_tokens=st.sampled_from([100, 100, 100, 70, 50]),
        claimed_tokens=st.integers(0, 13).map(lambda tens: 10 * tens),
        sequences=st.integers(0, 60),
    )


def _expected(compare: Callable[[frozenset[str]], Selection], avoid: frozenset[str]) -> Selection:
    selection = compare(avoid)
    return compare(frozenset()) if selection.instance_id is None else selection


@settings(deadline=None, max_examples=200)
@given(
    st.lists(_prefill_views(_IDS), max_size=40, unique_by=lambda view: view.instance_id),
    st.lists(
        st.tuples(
            st.lists(_prefill_views(_IDS), max_size=3),
            st.lists(st.tuples(_IDS, _PROMPTS), max_size=6),
            _PROMPTS,
            st.integers(1, 99),
            st.frozensets(_IDS, max_size=4),
            st.none() | _IDS,
            _FAILURES,
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_prefill_choice_is_that_of_the_full_comparison(
    first: list[PrefillView],
    rounds: list[
        tuple[
            list[PrefillView],
            list[tuple[str, list[int]]],
            list[int],
            int,
            frozenset[str],
            str | None,
            dict[str, float],
        ]
    ],
) -> None:
    index, tracker = PrefillIndex(_SLACK_TOKENS), PrefixTracker(_BLOCK_SIZE, max_blocks_per_instance=12)
    for view in first:
        index.put(view)
    for changed, computed, prompt, num_tokens, avoid, gone, failures in rounds:
        for view in changed:
            index.put(view)
        for instance_id, its_prompt in computed:
            tracker.record(instance_id, _names(its_prompt), num_pool_blocks=12)
        if gone is not None:
            index.remove(gone)
            tracker.forget(gone)
        names = _names(prompt)

        def compare(
            avoid: frozenset[str],
            names: object = names,
            num_tokens: int = num_tokens,
            failures: dict[str, float] = failures,
        ) -> Selection:
            assert isinstance(names, list)
            return choose_prefill(
                [
                    replace(view, cached_prefix_tokens=tracker.matched_tokens(view.instance_id, names))
                    for view in index.views.values()
                    if view.instance_id not in avoid
                ],
                num_tokens=num_tokens,
                needed_tokens=num_tokens + 1,
                decode_fingerprints={"f"},
                slack_tokens=_SLACK_TOKENS,
                failures=failures,
                last_chosen=index.last_chosen,
            )

        for _ in range(2):
            expected = _expected(compare, avoid)
            for find in (index.select, index.best):
                query = PrefillQuery(
                    num_tokens,
                    num_tokens + 1,
                    {"f"},
                    holders=list(tracker.holders(names)),
                    avoid=avoid,
                    failures=failures,
                )
                found = find(query)
                _check(found, expected, len(index.views))
            if expected.instance_id is not None:
                index.take(index.views[expected.instance_id])


@settings(deadline=None, max_examples=200)
@given(
    st.lists(_decode_views(_IDS), max_size=40, unique_by=lambda view: view.instance_id),
    st.lists(
        st.tuples(
            st.lists(_decode_views(_IDS), max_size=3),
            st.integers(1, 99),
            st.integers(0, 60),
            st.integers(1, 30),
            st.frozensets(_IDS, max_size=4),
            st.none() | _IDS,
            _FAILURES,
            st.sampled_from(["f", "f", None]),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_decode_choice_is_that_of_the_full_comparison(
    first: list[DecodeView],
    rounds: list[tuple[list[DecodeView], int, int, int, frozenset[str], str | None, dict[str, float], str | None]],
) -> None:
    index = DecodeIndex()
    for view in first:
        index.put(view)
    for changed, num_tokens, growth_tokens, needed_growth, avoid, gone, failures, fingerprint in rounds:
        for view in changed:
            index.put(view)
        if gone is not None:
            index.remove(gone)
        needed_tokens = num_tokens + needed_growth
        ready = [view for view in index.views.values() if view.ready and needed_tokens <= view.max_model_len]
        for each in "fgh":
            longest = any(view.fingerprint == each for view in ready)
            assert (each in index.fingerprints_for(needed_tokens)) == longest

        def asked(
            num_tokens: int = num_tokens,
            growth_tokens: int = growth_tokens,
            needed_tokens: int = needed_tokens,
            fingerprint: str | None = fingerprint,
            failures: dict[str, float] = failures,
        ) -> dict[str, Any]:
            return {
                "num_tokens": num_tokens,
                "growth_tokens": growth_tokens,
                "needed_tokens": needed_tokens,
                "fingerprint": fingerprint,
                "failures": failures,
            }

        def compare(avoid: frozenset[str], asked: Callable[[], dict[str, Any]] = asked) -> Selection:
            views = [view for view in index.views.values() if view.instance_id not in avoid]
            return choose_decode(views, last_chosen=index.last_chosen, **asked())

        for _ in range(2):
            expected = _expected(compare, avoid)
            _check(index.select(DecodeQuery(avoid=avoid, **asked())), expected, len(index.views))
            _check(index.best(DecodeQuery(avoid=avoid, **asked())), expected, len(index.views))
            if expected.instance_id is not None:
                index.take(index.views[expected.instance_id])


def _check(found: Selection | Scored | None, expected: Selection, num_instances: int) -> None:
    if not isinstance(found, Selection):
        assert (None if found is None else found.rank[3]) == expected.instance_id
        return
    assert found.instance_id == expected.instance_id
    assert found.candidates == expected.candidates[: len(found.candidates)]
    usable = sum(candidate.score is not None for candidate in expected.candidates)
    if usable:
        assert len(found.candidates) == min(3, usable)
    assert len(found.candidates) + found.others == num_instances


def _take_prefill(index: PrefillIndex, avoid: Set[str] = frozenset(), exclude: Set[str] = frozenset()) -> str | None:
    found = index.best(PrefillQuery(5, 6, {"f"}, avoid=avoid, exclude=exclude))
    if found is None:
        return None
    index.take(index.views[found.rank[3]])
    return found.rank[3]


def _take_decode(index: DecodeIndex) -> str:
    found = index.best(DecodeQuery(5, 5, 10, "f"))
    assert found is not None
    index.take(index.views[found.rank[3]])
    return found.rank[3]


def test_equals_take_turns_and_a_newcomer_is_first() -> None:
    prefill, decode = PrefillIndex(_SLACK_TOKENS), DecodeIndex()
    for name in "cab":
        prefill.put(replace(_PREFILL, instance_id=name))
        decode.put(replace(_DECODE, instance_id=name))
    assert [_take_prefill(prefill) for _ in range(5)] == list("abcab")
    assert [_take_decode(decode) for _ in range(5)] == list("abcab")
    prefill.put(replace(_PREFILL, instance_id="new"))
    assert _take_prefill(prefill) == "new"
    prefill.remove("c")
    assert [_take_prefill(prefill) for _ in range(3)] == ["a", "b", "new"]


def test_avoided_instances_are_a_last_resort_and_excluded_ones_no_candidates() -> None:
    index = PrefillIndex(_SLACK_TOKENS)
    for name in "ab":
        index.put(replace(_PREFILL, instance_id=name))
    assert [_take_prefill(index, avoid={"a"}) for _ in range(2)] == ["b", "b"]
    assert _take_prefill(index, avoid={"a"}, exclude={"b"}) == "a"
    assert _take_prefill(index, avoid={"a"}, exclude={"a", "b"}) is None


def test_a_selection_counts_the_candidates_that_it_does_not_list() -> None:
    index = PrefillIndex(_SLACK_TOKENS)
    for number in range(10):
        index.put(replace(_PREFILL, instance_id=str(number), queued_tokens=number))
    lines = index.select(PrefillQuery(5, 6, {"f"})).explain().splitlines()
    assert lines[1].endswith("worse by 1")
    assert lines[-1] == "and 7 more that were no better"


def test_without_a_candidate_each_instance_has_a_reason() -> None:
    prefill, decode = PrefillIndex(_SLACK_TOKENS), DecodeIndex()
    prefill.put(_PREFILL)
    decode.put(_DECODE)
    assert prefill.best(PrefillQuery(1000, 1001, {"f"})) is None
    assert "its context is too short (1000 tokens)" in prefill.select(PrefillQuery(1000, 1001, {"f"})).explain()
    assert "no decode instance has its KV layout" in prefill.select(PrefillQuery(10, 11, {"g"})).explain()
    assert decode.best(DecodeQuery(5, 5, 6, "g")) is None
    assert "its KV layout is not the prefill instance's" in decode.select(DecodeQuery(5, 5, 6, "g")).explain()


def test_lengths_that_no_ready_instance_has_cost_nothing() -> None:
    """Restarted instances may have pools of other sizes each time."""
    index = PrefillIndex(_SLACK_TOKENS)
    for max_model_len in range(100, 110):
        index.put(replace(_PREFILL, instance_id="a", max_model_len=max_model_len))
        index.put(replace(_PREFILL, instance_id=f"lost-{max_model_len}", max_model_len=max_model_len, ready=False))
    assert len(index._orders) == 1
    index.remove("a")
    assert not index._orders

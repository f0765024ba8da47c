"""The books choose what the full comparison of `scheduling.routing` chooses."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.errors import ContextLengthError, UnavailableError
from tandem.scheduling.decode_book import DecodeBook
from tandem.scheduling.prefill_book import PrefillBook
from tandem.scheduling.prefix_tracker import PrefixTracker
from tandem.scheduling.routing import Choice, DecodeView, PrefillView, choose_decode, choose_prefill

_BLOCK_SIZE = 10
_SLACK_TOKENS = 25
_PREFILL = PrefillView("a", "f", ready=True, max_model_len=1000, queued_tokens=0, running=0)
_DECODE = DecodeView("a", "f", ready=True, max_model_len=99, block_size=10, total_blocks=10, free_blocks=10, running=0)

_IDS = st.sampled_from([f"{letter}{digit}" for letter in "abcdef" for digit in "12345"])
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
        running=st.just(0),
    )


def _decode_views(ids: st.SearchStrategy[str]) -> st.SearchStrategy[DecodeView]:
    return st.builds(
        DecodeView,
        instance_id=ids,
        fingerprint=st.sampled_from(["f", "f", "f", "g"]),
        ready=st.sampled_from([True, True, True, False]),
        max_model_len=st.sampled_from([50, 99, 99]),
        block_size=st.sampled_from([10, 10, 5]),
        total_blocks=st.sampled_from([10, 10, 10, 7]),
        free_blocks=st.integers(0, 7),
        running=st.integers(0, 60),
        waiting=st.integers(0, 1),
        waiting_tokens=st.integers(0, 30),
    )


def _expected(compare: Callable[[frozenset[str]], Choice], avoid: frozenset[str]) -> Choice:
    choice = compare(avoid)
    return compare(frozenset()) if choice.instance_id is None else choice


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
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_prefill_choice_is_that_of_the_full_comparison(
    first: list[PrefillView],
    rounds: list[tuple[list[PrefillView], list[tuple[str, list[int]]], list[int], int, frozenset[str], str | None]],
) -> None:
    book, tracker = PrefillBook(_SLACK_TOKENS), PrefixTracker(_BLOCK_SIZE, max_blocks_per_instance=12)
    for view in first:
        book.put(view)
    for changed, computed, prompt, num_tokens, avoid, gone in rounds:
        for view in changed:
            book.put(view)
        for instance_id, its_prompt in computed:
            tracker.record(instance_id, _names(its_prompt))
        if gone is not None:
            book.remove(gone)
            tracker.forget(gone)
        names = _names(prompt)

        def compare(avoid: frozenset[str], names: object = names, num_tokens: int = num_tokens) -> Choice:
            assert isinstance(names, list)
            return choose_prefill(
                [
                    replace(view, cached_prefix_tokens=tracker.matched_tokens(view.instance_id, names))
                    for view in book.views.values()
                    if view.instance_id not in avoid
                ],
                num_tokens=num_tokens,
                decode_fingerprints={"f"},
                slack_tokens=_SLACK_TOKENS,
                last_chosen=dict(book.last_chosen),
            )

        expected = _expected(compare, avoid)
        found = book.choose(
            num_tokens=num_tokens, decode_fingerprints={"f"}, holders=tracker.holders(names), avoid=avoid
        )
        _check(found, expected, len(book.views))
        expected = _expected(compare, avoid)
        assert expected.instance_id == book.pick(
            num_tokens=num_tokens, decode_fingerprints={"f"}, holders=tracker.holders(names), avoid=avoid
        )


@settings(deadline=None, max_examples=200)
@given(
    st.lists(_decode_views(_IDS), max_size=40, unique_by=lambda view: view.instance_id),
    st.lists(
        st.tuples(
            st.lists(_decode_views(_IDS), max_size=3),
            st.integers(1, 99),
            st.integers(0, 60),
            st.frozensets(_IDS, max_size=4),
            st.none() | _IDS,
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_decode_choice_is_that_of_the_full_comparison(
    first: list[DecodeView], rounds: list[tuple[list[DecodeView], int, int, frozenset[str], str | None]]
) -> None:
    book = DecodeBook()
    for view in first:
        book.put(view)
    for changed, num_tokens, growth_tokens, avoid, gone in rounds:
        for view in changed:
            book.put(view)
        if gone is not None:
            book.remove(gone)
        ready = [view for view in book.views.values() if view.ready and num_tokens < view.max_model_len]
        for fingerprint in "fgh":
            longest = any(view.fingerprint == fingerprint for view in ready)
            assert (fingerprint in book.fingerprints_for(num_tokens)) == longest

        def compare(avoid: frozenset[str], num_tokens: int = num_tokens, growth: int = growth_tokens) -> Choice:
            return choose_decode(
                [view for view in book.views.values() if view.instance_id not in avoid],
                num_tokens=num_tokens,
                growth_tokens=growth,
                fingerprint="f",
                last_chosen=dict(book.last_chosen),
            )

        expected = _expected(compare, avoid)
        found = book.choose(num_tokens=num_tokens, growth_tokens=growth_tokens, fingerprint="f", avoid=avoid)
        _check(found, expected, len(book.views))
        expected = _expected(compare, avoid)
        assert expected.instance_id == book.pick(
            num_tokens=num_tokens, growth_tokens=growth_tokens, fingerprint="f", avoid=avoid
        )


def _check(found: Choice, expected: Choice, num_instances: int) -> None:
    assert (found.instance_id, found.too_long) == (expected.instance_id, expected.too_long)
    assert found.candidates == expected.candidates[: len(found.candidates)]
    usable = sum(candidate.score is not None for candidate in expected.candidates)
    if usable:
        assert len(found.candidates) == min(3, usable)
    assert len(found.candidates) + found.others == num_instances


def test_equals_take_turns_and_a_newcomer_is_first() -> None:
    prefill, decode = PrefillBook(_SLACK_TOKENS), DecodeBook()
    for name in "cab":
        prefill.put(replace(_PREFILL, instance_id=name))
        decode.put(replace(_DECODE, instance_id=name))
    taken = [prefill.pick(num_tokens=5, decode_fingerprints={"f"}) for _ in range(5)]
    assert taken == list("abcab")
    assert [decode.pick(num_tokens=5, growth_tokens=5, fingerprint="f") for _ in range(5)] == list("abcab")
    prefill.put(replace(_PREFILL, instance_id="new"))
    assert prefill.pick(num_tokens=5, decode_fingerprints={"f"}) == "new"
    prefill.remove("c")
    assert [prefill.pick(num_tokens=5, decode_fingerprints={"f"}) for _ in range(3)] == ["a", "b", "new"]


def test_a_choice_says_how_many_it_does_not_list() -> None:
    book = PrefillBook(_SLACK_TOKENS)
    for number in range(10):
        book.put(replace(_PREFILL, instance_id=str(number), queued_tokens=number))
    lines = book.choose(num_tokens=5, decode_fingerprints={"f"}).explain().splitlines()
    assert lines[1].endswith("worse by 1")
    assert lines[-1] == "and 7 more that were no better"


def test_nobody_to_choose() -> None:
    prefill, decode = PrefillBook(_SLACK_TOKENS), DecodeBook()
    prefill.put(_PREFILL)
    decode.put(_DECODE)
    assert prefill.pick(num_tokens=1000, decode_fingerprints={"f"}) is None
    with pytest.raises(ContextLengthError):
        prefill.choose(num_tokens=1000, decode_fingerprints={"f"}).require()
    with pytest.raises(UnavailableError):
        prefill.choose(num_tokens=10, decode_fingerprints={"g"}).require()
    assert decode.pick(num_tokens=5, growth_tokens=5, fingerprint="g") is None
    choice = decode.choose(num_tokens=5, growth_tokens=5, fingerprint="g")
    assert "its KV layout is not the prefill instance's" in choice.explain()

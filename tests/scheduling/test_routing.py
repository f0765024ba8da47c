from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.scheduling.routing import DecodeView, PrefillView, Selection, choose_decode, choose_prefill

_PREFILL = PrefillView("a", "f", ready=True, max_model_len=1000, queued_tokens=0)
_DECODE = DecodeView("a", "f", ready=True, max_model_len=1000, capacity_tokens=1600, claimed_tokens=0, sequences=0)


def _prefill(
    *views: PrefillView,
    num_tokens: int = 100,
    slack_tokens: int = 200,
    failures: dict[str, float] | None = None,
    **last_chosen: int,
) -> Selection:
    return choose_prefill(
        views,
        num_tokens=num_tokens,
        needed_tokens=num_tokens + 1,
        decode_fingerprints={"f"},
        slack_tokens=slack_tokens,
        failures=failures or {},
        last_chosen=last_chosen,
    )


def _decode(
    *views: DecodeView,
    num_tokens: int = 100,
    growth_tokens: int = 60,
    needed_tokens: int = 0,
    fingerprint: str | None = "f",
    failures: dict[str, float] | None = None,
    **last_chosen: int,
) -> Selection:
    return choose_decode(
        views,
        num_tokens=num_tokens,
        growth_tokens=growth_tokens,
        needed_tokens=needed_tokens or num_tokens + 1,
        fingerprint=fingerprint,
        failures=failures or {},
        last_chosen=last_chosen,
    )


def test_prefill_goes_to_the_shortest_queue() -> None:
    selection = _prefill(replace(_PREFILL, queued_tokens=50), replace(_PREFILL, instance_id="b", queued_tokens=40))
    assert selection.instance_id == "b"
    assert [(c.instance_id, c.score, c.reason) for c in selection.candidates] == [
        ("b", 140, ""),
        ("a", 150, "worse by 10"),
    ]


def test_a_cached_prefix_is_worth_the_tokens_it_saves_and_no_more() -> None:
    warm = replace(_PREFILL, instance_id="warm", cached_prefix_tokens=64)
    cold = replace(_PREFILL, instance_id="cold")
    assert _prefill(replace(warm, queued_tokens=63), cold).instance_id == "warm"
    assert _prefill(replace(warm, queued_tokens=65), cold).instance_id == "cold"


def test_cached_tokens_do_not_count_beyond_the_slack() -> None:
    warm = replace(_PREFILL, instance_id="warm", cached_prefix_tokens=900, queued_tokens=201)
    cold = replace(_PREFILL, instance_id="cold")
    assert _prefill(warm, cold, num_tokens=990).instance_id == "cold"
    assert _prefill(replace(warm, queued_tokens=200), cold, num_tokens=990).instance_id == "warm"


def test_among_equals_the_one_chosen_longest_ago_is_next() -> None:
    views = [replace(_PREFILL, instance_id=name) for name in "cab"]
    decode_views = [replace(_DECODE, instance_id=name) for name in "cab"]
    for last_chosen, winner in (({}, "a"), ({"a": 1}, "b"), ({"a": 1, "b": 2}, "c"), ({"a": 4, "b": 2, "c": 3}, "b")):
        assert _prefill(*views, **last_chosen).instance_id == winner
        selection = _decode(*decode_views, **last_chosen)
        assert selection.instance_id == winner
        assert {candidate.reason for candidate in selection.candidates} == {"", "equal; another's turn"}


def test_each_instance_that_cannot_take_the_request_has_a_reason() -> None:
    selection = _prefill(
        replace(_PREFILL, instance_id="loading", ready=False),
        replace(_PREFILL, instance_id="other", fingerprint="g"),
        replace(_PREFILL, instance_id="short", max_model_len=100),
        replace(_PREFILL, instance_id="busy", queued_tokens=999),
    )
    assert selection.instance_id == "busy"
    assert {c.instance_id: c.reason for c in selection.candidates[1:]} == {
        "loading": "not ready",
        "other": "no decode instance has its KV layout",
        "short": "its context is too short (100 tokens)",
    }
    assert "busy: queued 999 + prompt 100 + cached 0 = 1099  chosen" in selection.explain()
    assert "loading:   not ready" in selection.explain()


def test_nothing_is_selected_without_a_usable_instance() -> None:
    for selection in (
        _prefill(),
        _decode(replace(_DECODE, ready=False)),
        _prefill(_PREFILL, num_tokens=1000),
        _decode(_DECODE, num_tokens=1000),
    ):
        assert selection.instance_id is None
        assert all(candidate.score is None and candidate.reason for candidate in selection.candidates)


def test_decode_goes_where_most_memory_and_fewest_sequences_are() -> None:
    other = replace(_DECODE, instance_id="b")
    assert _decode(replace(_DECODE, claimed_tokens=800), other).instance_id == "b"
    assert _decode(replace(_DECODE, sequences=3), other).instance_id == "b"
    assert _decode(replace(_DECODE, sequences=1, claimed_tokens=500), other).instance_id == "b"
    loaded = replace(_DECODE, claimed_tokens=800)
    assert _decode(loaded, replace(other, fingerprint="g")).instance_id == "a"
    assert _decode(loaded, replace(other, fingerprint="g"), fingerprint=None).instance_id == "b"


def test_an_instance_counts_only_if_it_can_hold_prompt_and_answer() -> None:
    loaded = replace(_DECODE, instance_id="b", max_model_len=2000, claimed_tokens=800)
    assert _decode(_DECODE, loaded).instance_id == "a"
    selection = _decode(_DECODE, loaded, needed_tokens=1001)
    assert selection.instance_id == "b"
    assert selection.candidates[1].reason == "its context is too short (1000 tokens)"


def test_recent_failures_count_and_are_explained() -> None:
    views = [_PREFILL, replace(_PREFILL, instance_id="b", queued_tokens=1000)]
    selection = _prefill(*views, failures={"a": 0.5})
    assert selection.instance_id == "b"
    assert selection.candidates[1].reason == "worse by 1048; requests failed there recently"
    assert _prefill(*views, failures={"a": 0.25, "b": 0.125}).instance_id == "a"
    others = [_DECODE, replace(_DECODE, instance_id="b", claimed_tokens=800)]
    assert _decode(*others, failures={"a": 1.0}).instance_id == "b"
    assert _decode(*others, failures={"a": 0.25}).instance_id == "a"


def test_decode_avoids_a_wait_for_memory() -> None:
    full = replace(_DECODE, instance_id="full", claimed_tokens=1456)
    busy = replace(_DECODE, instance_id="busy", claimed_tokens=1440, sequences=30)
    assert _decode(full, busy).instance_id == "busy"


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.builds(
            PrefillView,
            instance_id=st.sampled_from("abcdef"),
            fingerprint=st.sampled_from(["f", "g"]),
            ready=st.booleans(),
            max_model_len=st.sampled_from([50, 1000]),
            queued_tokens=st.integers(0, 500),
            cached_prefix_tokens=st.integers(0, 100),
        ),
        unique_by=lambda view: view.instance_id,
    ),
)
def test_every_candidate_is_explained_and_the_choice_is_usable(views: list[PrefillView]) -> None:
    selection = _prefill(*views)
    assert sorted(c.instance_id for c in selection.candidates) == sorted(view.instance_id for view in views)
    usable = {v.instance_id for v in views if v.ready and v.fingerprint == "f" and v.max_model_len > 100}
    assert (selection.instance_id is None) == (not usable)
    for candidate in selection.candidates:
        assert (candidate.score is not None) == (candidate.instance_id in usable)
        assert bool(candidate.reason) == (candidate.instance_id != selection.instance_id)
        if candidate.score is not None:
            assert candidate.score == sum(value for _, value in candidate.terms)
            assert selection.candidates[0].score is not None
            assert candidate.score >= selection.candidates[0].score

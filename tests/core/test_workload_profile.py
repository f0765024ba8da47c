"""The live profile: what a window counts, when it closes, and that its sample is fair."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.workload_profile import ProfileSnapshot, ServedRequest, WorkloadProfile


def make_profile(**changes: float) -> WorkloadProfile:
    settings: dict[str, float] = {"window_s": 10.0, "capacity": 8, "min_requests": 4} | changes
    return WorkloadProfile(
        window_s=settings["window_s"],
        capacity=int(settings["capacity"]),
        min_requests=int(settings["min_requests"]),
        random=Random(int(settings.get("seed", 0))),
        now_s=100.0,
    )


def fill(profile: WorkloadProfile, times_s: list[float]) -> None:
    for number, now_s in enumerate(times_s, start=1):
        profile.arrived(now_s)
        profile.finished(ServedRequest(number, 2 * number, cached_tokens=number - 1), now_s)


def test_nothing_before_a_window_has_closed() -> None:
    profile = make_profile()
    fill(profile, [101.0, 102.0, 103.0, 104.0])
    assert profile.snapshot(109.9) is None


def test_a_window_keeps_all_requests_up_to_its_capacity() -> None:
    profile = make_profile()
    fill(profile, [101.0, 103.0, 105.0, 107.0])
    snapshot = profile.snapshot(110.0)
    assert snapshot is not None
    assert (snapshot.window, snapshot.window_s, snapshot.arrivals, snapshot.finished) == (0, 10.0, 4, 4)
    assert snapshot.rate == pytest.approx(0.4)
    assert snapshot.arrival_cv == pytest.approx(0.0)
    assert snapshot.arrival_s == (1.0, 3.0, 5.0, 7.0)
    assert snapshot.kept_s == 10.0
    assert snapshot.prompt_tokens == (1, 2, 3, 4)
    assert snapshot.output_tokens == (2, 4, 6, 8)
    assert snapshot.cached_tokens == (0, 1, 2, 3)
    assert snapshot.slo_class == (0, 0, 0, 0)


def test_a_window_with_few_requests_lasts_longer() -> None:
    profile = make_profile()
    fill(profile, [101.0, 130.0, 160.0])
    assert profile.snapshot(190.0) is None
    fill(profile, [195.0])
    snapshot = profile.snapshot(200.0)
    assert snapshot is not None
    assert snapshot.window_s == 100.0
    assert snapshot.rate == pytest.approx(0.04)


def test_refused_requests_count_as_arrivals() -> None:
    profile = make_profile()
    fill(profile, [101.0, 102.0, 103.0, 104.0])
    for _ in range(6):
        profile.arrived(105.0)
    snapshot = profile.snapshot(110.0)
    assert snapshot is not None
    assert (snapshot.arrivals, snapshot.finished) == (10, 4)


def test_windows_do_not_overlap() -> None:
    profile = make_profile()
    fill(profile, [101.0, 102.0, 103.0, 104.0])
    fill(profile, [111.0, 112.0, 113.0])
    first = profile.snapshot(119.0)
    fill(profile, [120.9, 121.0])
    second = profile.snapshot(135.0)
    assert first is not None
    assert second is not None
    assert (first.window, first.arrivals) == (0, 4)
    assert (second.window, second.arrivals) == (1, 4), "the request that comes after the window's end opens the next"
    assert second.prompt_tokens == (1, 2, 3, 1)


def test_bursts_raise_the_coefficient_of_variation() -> None:
    profile = make_profile(window_s=1000.0)
    fill(profile, [100.0 + 100 * burst + 0.001 * i for burst in range(10) for i in range(10)])
    snapshot = profile.snapshot(1200.0)
    assert snapshot is not None
    assert snapshot.arrival_cv > 2.0


def test_every_request_is_equally_likely_in_the_sample() -> None:
    """60 requests, 8 places, 1500 draws: each is expected 200 times, with a standard deviation of 13."""
    counts: Counter[int] = Counter()
    for seed in range(1500):
        profile = make_profile(seed=seed)
        fill(profile, [101.0] * 60)
        snapshot = profile.snapshot(110.0)
        assert snapshot is not None
        counts.update(snapshot.prompt_tokens)
    assert len(counts) == 60
    assert all(abs(count - 200) < 5 * 13.2 for count in counts.values())


def test_of_many_arrivals_the_first_are_kept() -> None:
    profile = make_profile()
    fill(profile, [100.0 + 0.1 * i for i in range(60)])
    snapshot = profile.snapshot(110.0)
    assert snapshot is not None
    assert snapshot.arrival_s == pytest.approx([0.1 * i for i in range(8)])
    assert snapshot.kept_s == pytest.approx(0.7)


def test_pooled_windows_follow_each_other() -> None:
    one = ProfileSnapshot(4, 10.0, 2, 1.0, 2, (1.0, 6.0), (5, 6), (7, 8), (0, 1), (0, 0))
    other = ProfileSnapshot(5, 30.0, 4, 2.0, 1, (0.5, 2.0), (9,), (3,), (2,), (1,))
    pooled = ProfileSnapshot.pooled([one, other, one])
    assert (pooled.window, pooled.window_s, pooled.arrivals, pooled.finished) == (4, 50.0, 8, 5)
    assert pooled.arrival_cv == pytest.approx(4 / 3)
    assert pooled.arrival_s == (1.0, 6.0, 10.5, 12.0, 13.0, 18.0), "the rest of the second window was not kept"
    assert pooled.prompt_tokens == (5, 6, 9, 5, 6)
    assert pooled.slo_class == (0, 0, 1, 0, 0)
    assert ProfileSnapshot.pooled([one]) == one


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 5.0), max_size=200), st.integers(0, 3))
def test_counts_and_bounds_hold_for_any_arrivals(gaps_s: list[float], seed: int) -> None:
    profile = make_profile(seed=seed)
    now_s, number_of_windows, total = 100.0, 0, 0
    seen: set[int] = set()
    for gap_s in gaps_s:
        now_s += gap_s
        profile.arrived(now_s)
        profile.finished(ServedRequest(7, 1), now_s)
        snapshot = profile.snapshot(now_s)
        if snapshot is not None and snapshot.window not in seen:
            seen.add(snapshot.window)
            number_of_windows += 1
            total += snapshot.finished
            assert snapshot.window_s >= 10.0
            assert snapshot.finished >= 4
            assert len(snapshot.prompt_tokens) == min(8, snapshot.finished)
            assert snapshot.arrival_cv >= 0.0
    assert total <= len(gaps_s)
    assert seen == set(range(number_of_windows))

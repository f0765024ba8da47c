"""The states of drift detection: they follow lasting changes and do not oscillate."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.replanning import DriftState
from tandem.placement.replanning.drift import Decision, DriftDetector, DriftPolicy
from tandem.placement.replanning.workload_distance import DriftThresholds, WorkloadStats

WINDOW_S = 300.0
POLICY = DriftPolicy()


def of_length(prompt_tokens: int) -> WorkloadStats:
    lengths = np.full(200, prompt_tokens, dtype=np.int64)
    return WorkloadStats(lengths, np.full(200, 10, dtype=np.int64), rate=1.0, rate_error=0.01, cached_share=0.0)


def mixed(share: float) -> WorkloadStats:
    """`share` of the prompts are long: its strength against the plan's is share / 0.25."""
    long = round(200 * share)
    lengths = np.concatenate((np.full(200 - long, 100), np.full(long, 900))).astype(np.int64)
    return WorkloadStats(lengths, np.full(200, 10, dtype=np.int64), rate=1.0, rate_error=0.01, cached_share=0.0)


PLANNED, OTHER, THIRD = of_length(100), of_length(900), of_length(5000)


class Run:
    """A detector with a planner that returns `gain` at once."""

    def __init__(self, gain: float | None = 0.5) -> None:
        self.detector = DriftDetector(PLANNED, DriftThresholds(), POLICY)
        self.gain = gain
        self.now_s = 0.0
        self.proposed_s: list[float] = []
        self.replanned_s: list[float] = []
        self.withdrawn_s: list[float] = []

    def see(self, *windows: WorkloadStats) -> DriftState:
        for live in windows:
            self.now_s += WINDOW_S
            decision = self.detector.observe(live, self.now_s)
            if decision is Decision.WITHDRAW:
                self.withdrawn_s.append(self.now_s)
            if decision is Decision.REPLAN:
                assert self.detector.state is DriftState.REPLANNING
                self.replanned_s.append(self.now_s)
                if self.detector.record_result(self.gain, self.now_s):
                    self.proposed_s.append(self.now_s)
        return self.detector.state


def test_the_planned_workload_is_stable() -> None:
    run = Run()
    assert run.see(*[PLANNED] * 50) is DriftState.STABLE
    assert run.replanned_s == []


def test_lasting_drift_causes_one_proposal() -> None:
    run = Run()
    assert run.see(OTHER) is DriftState.SUSPECT
    assert run.see(OTHER) is DriftState.SUSPECT
    assert run.see(OTHER) is DriftState.PROPOSED
    assert run.see(*[OTHER] * 100) is DriftState.PROPOSED
    assert run.replanned_s == [3 * WINDOW_S]


def test_one_ordinary_window_ends_the_suspicion() -> None:
    run = Run()
    run.see(OTHER, OTHER, PLANNED)
    assert run.see(OTHER, OTHER) is DriftState.SUSPECT
    assert run.replanned_s == []


def test_between_both_thresholds_the_state_does_not_change() -> None:
    below, above = mixed(0.20), mixed(0.26)  # strengths 0.8 and 1.04; it ends below 0.7
    run = Run()
    assert run.see(*[below] * 10) is DriftState.STABLE
    run.see(above, below)
    assert run.see(below) is DriftState.PROPOSED
    assert run.see(*[below] * 10) is DriftState.PROPOSED


def test_a_proposal_is_withdrawn_after_several_windows_without_drift() -> None:
    run = Run()
    run.see(*[OTHER] * 3)
    assert run.see(*[PLANNED] * 5, OTHER, *[PLANNED] * 5) is DriftState.PROPOSED
    assert run.see(PLANNED) is DriftState.COOLING
    assert run.withdrawn_s == [run.now_s]


def test_a_third_workload_replaces_the_proposal() -> None:
    run = Run()
    run.see(*[OTHER] * 3, *[THIRD] * 6)
    assert run.detector.state is DriftState.COOLING
    assert run.see(*[THIRD] * 18) is DriftState.PROPOSED
    assert len(run.proposed_s) == 2


def test_a_small_gain_is_not_proposed_and_not_planned_for_again() -> None:
    run = Run(gain=0.09)
    run.see(*[OTHER] * 500)
    assert run.detector.state is DriftState.STABLE
    assert run.proposed_s == []
    assert len(run.replanned_s) == 1
    run.gain = 0.2
    assert run.see(*[THIRD] * 6) is DriftState.PROPOSED, "other requests are another question"


def test_a_failing_planner_is_retried_with_backoff() -> None:
    run = Run(gain=None)
    run.see(*[OTHER] * 1000)
    pauses_s = np.diff(run.replanned_s)
    assert all(later >= earlier for earlier, later in itertools.pairwise(pauses_s))
    for pause_s, backoff in ((pauses_s[0], 2), (pauses_s[-1], POLICY.max_backoff)):
        least_s = POLICY.cool_down_s * backoff
        assert least_s < pause_s <= least_s + (POLICY.confirm_windows * backoff + 1) * WINDOW_S


def test_fast_alternation_brings_no_proposal() -> None:
    for windows_each in (1, 2):
        run = Run()
        for _ in range(200):
            run.see(*[OTHER] * windows_each, *[PLANNED] * windows_each)
        assert run.replanned_s == []


def test_a_proposal_for_a_mixture_stays_when_its_parts_alternate() -> None:
    run = Run()
    run.see(*[mixed(0.5)] * 3)
    assert run.see(*[mixed(0.1), mixed(0.9)] * 50) is DriftState.PROPOSED
    assert run.see(*[mixed(0.0)] * 12) is DriftState.COOLING


def test_alternation_around_the_planned_mixture_is_no_drift() -> None:
    """Neither workload is the planned one, but the plan is for their mixture."""
    run = Run()
    run.detector = DriftDetector(mixed(0.5), DriftThresholds(), POLICY)
    assert run.see(*[mixed(0.2), mixed(0.8)] * 50) is DriftState.SUSPECT
    assert run.replanned_s == []


def test_alternation_within_a_window_is_a_mixture_and_brings_one() -> None:
    run = Run()
    assert run.see(*[mixed(0.5)] * 300) is DriftState.PROPOSED
    assert len(run.proposed_s) == 1


@pytest.mark.parametrize("windows_each", [3, 4, 5])
def test_alternation_as_fast_as_confirmation_brings_one(windows_each: int) -> None:
    """50 h and more. Without backoff it would be a hundred proposals."""
    run = Run()
    for _ in range(100):
        run.see(*[OTHER] * windows_each, *[PLANNED] * windows_each)
    assert len(run.proposed_s) == 1


@pytest.mark.parametrize("windows_each", [6, 8, 12, 16, 20])
def test_alternation_of_up_to_100_minutes_causes_few_proposals(windows_each: int) -> None:
    run = Run()
    for _ in range(60):
        run.see(*[OTHER] * windows_each, *[PLANNED] * windows_each)
    assert len(run.proposed_s) <= 3
    assert run.proposed_s[-1] < 24 * 3600


def test_slow_alternation_is_followed() -> None:
    """Eight hours each: every change causes a proposal as soon as it is confirmed."""
    run = Run()
    windows = round(8 * 3600 / WINDOW_S)
    for phase in range(10):
        run.see(*[OTHER] * windows, *[PLANNED] * windows)
        assert len(run.proposed_s) == len(run.withdrawn_s) == phase + 1
        began_s = phase * 2 * windows * WINDOW_S
        assert run.proposed_s[-1] - began_s == POLICY.confirm_windows * WINDOW_S
        assert run.withdrawn_s[-1] - began_s == (windows + POLICY.withdraw_windows) * WINDOW_S


@settings(deadline=None)
@given(
    windows=st.lists(st.sampled_from([PLANNED, OTHER, THIRD, mixed(0.2), mixed(0.5)]), max_size=300),
    gains=st.lists(st.sampled_from([None, 0.0, 0.05, 0.1, 0.5]), min_size=1, max_size=20),
)
def test_for_any_workload_planning_is_rare_and_proposals_gain(
    windows: list[WorkloadStats], gains: list[float | None]
) -> None:
    run = Run()
    for number, live in enumerate(windows):
        run.gain = gains[number % len(gains)]
        before = len(run.proposed_s)
        state = run.see(live)
        if len(run.proposed_s) > before:
            assert run.gain is not None
            assert run.gain >= POLICY.min_gain
        is_open = len(run.proposed_s) > len(run.withdrawn_s)
        assert is_open == (state is DriftState.PROPOSED)
    least_s = POLICY.cool_down_s + (POLICY.confirm_windows - 1) * WINDOW_S
    assert all(pause_s >= least_s for pause_s in np.diff(run.replanned_s))


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=400))
def test_random_alternation_proposes_at_most_once_in_a_cool_down(is_other: list[bool]) -> None:
    run = Run()
    run.see(*[OTHER if other else PLANNED for other in is_other])
    lived_s = [gone_s - made_s for made_s, gone_s in zip(run.proposed_s, run.withdrawn_s, strict=False)]
    pauses_s = [made_s - gone_s for gone_s, made_s in zip(run.withdrawn_s, run.proposed_s[1:], strict=False)]
    backoff = 1
    for life_s, pause_s in zip(lived_s, pauses_s, strict=False):
        backoff = 1 if life_s >= POLICY.short_lived_s else min(2 * backoff, POLICY.max_backoff)
        assert pause_s >= POLICY.cool_down_s * backoff


def test_a_result_without_planning_is_an_assertion_error() -> None:
    with pytest.raises(AssertionError):
        Run().detector.record_result(0.5, 0.0)

"""The table of live against simulated."""

from dataclasses import replace

import pytest

from bench.fidelity.live.drift import StepTimeDrift
from bench.fidelity.live.table import LiveComparison, RunFigures

LIVE = RunFigures(0.90, 0.92, 0.95, 0.200, 0.0100, {"prefill_s": 0.15})
NO_DRIFT = StepTimeDrift(1.0, 1.0)
SAME = LiveComparison("w", 0.5, 2.0, 100, 0.5, 0.02, LIVE, (LIVE,) * 2, drifts=(NO_DRIFT,) * 2, with_drifts=(LIVE,) * 2)


def test_the_aim_is_three_points_and_eight_percent() -> None:
    assert SAME.is_met
    assert replace(SAME, simulated=replace(LIVE, attainment=0.925, ttft_s=0.212, tpot_s=0.0095)).is_met
    assert not replace(SAME, simulated=replace(LIVE, attainment=0.86)).is_met
    assert not replace(SAME, simulated=replace(LIVE, ttft_s=0.220)).is_met
    assert not replace(SAME, simulated=replace(LIVE, tpot_s=0.0090)).is_met


def test_repetitions_are_averaged_and_their_spread_is_shown() -> None:
    two = replace(SAME, live=(replace(LIVE, attainment=0.8), replace(LIVE, attainment=0.9)))
    assert abs(two.live_mean("attainment") - 0.85) < 1e-12
    assert abs(two.live_spread("attainment") - 0.1) < 1e-12
    assert abs(two.attainment_error - 0.05) < 1e-12


def test_with_the_drift_of_each_run_the_mean_of_the_simulations_counts() -> None:
    drifted = replace(SAME, simulated=replace(LIVE, ttft_s=0.3), with_drifts=(LIVE, replace(LIVE, ttft_s=0.210)))
    assert not drifted.is_met
    assert drifted.knowing_the_drift().is_met
    assert drifted.knowing_the_drift().simulated.ttft_s == pytest.approx(0.205)

"""Differences between workloads count if they are large and significant."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.parallel import ParallelShape
from tandem.core.plan import Expected, Plan, PlanGroup
from tandem.core.slo_file import SloFile
from tandem.core.workload_profile import ProfileSnapshot
from tandem.placement.replanning.workload_distance import (
    DriftThresholds,
    WorkloadStats,
    compare,
    ks_critical,
    ks_statistic,
    strength,
    thresholds_for,
)
from tandem.placement.workload.requests import RequestStream

Lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def sorted_array(values: list[int]) -> np.ndarray:
    return np.sort(np.array(values, dtype=np.int64))


def drawn(seed: int, count: int, *, mean: float = 500.0, rate: float = 5.0, cv: float = 1.0) -> WorkloadStats:
    """Log-normal lengths, as a live window of `count` requests has them."""
    random = np.random.default_rng(seed)
    lengths = 1 + random.lognormal(math.log(mean), 1.0, size=(2, count)).astype(np.int64)
    arrivals = max(1, round(count + cv * math.sqrt(count) * random.standard_normal()))
    snapshot = ProfileSnapshot(
        window=0,
        window_s=count / rate,
        arrivals=arrivals,
        arrival_cv=cv,
        finished=count,
        arrival_s=(),
        prompt_tokens=tuple(lengths[0].tolist()),
        output_tokens=tuple(lengths[1].tolist()),
        cached_tokens=(0,) * count,
        slo_class=(0,) * count,
    )
    return WorkloadStats.live(snapshot)


@settings(deadline=None)
@given(Lengths, Lengths)
def test_ks_is_the_largest_distance_of_the_distribution_functions(first: list[int], second: list[int]) -> None:
    expected = max(
        abs(sum(v <= x for v in first) / len(first) - sum(v <= x for v in second) / len(second))
        for x in {*first, *second}
    )
    statistic = ks_statistic(sorted_array(first), sorted_array(second))
    assert statistic == pytest.approx(expected)
    assert statistic == ks_statistic(sorted_array(second), sorted_array(first))


def test_the_critical_value_has_its_false_alarm_rate() -> None:
    """At 5 %, of 400 pairs drawn alike about 20 may exceed it; 40 would be eight standard deviations off."""
    random = np.random.default_rng(0)
    exceeded = 0
    for _ in range(400):
        first, second = np.sort(random.integers(1, 10**6, 150)), np.sort(random.integers(1, 10**6, 250))
        exceeded += ks_statistic(first, second) > ks_critical(150, 250, 0.05)
    assert 4 <= exceeded <= 40


def test_samples_of_one_distribution_do_not_differ() -> None:
    planned = drawn(0, 2000)
    assert max(strength(compare(planned, drawn(seed, 150), DriftThresholds())) for seed in range(1, 60)) < 1.0


def test_a_small_difference_in_a_large_sample_is_significant_but_not_large() -> None:
    planned, live = drawn(0, 40000), drawn(1, 40000, mean=550.0)
    prompt = compare(planned, live, DriftThresholds())[1]
    assert 0.0 < prompt.strength < 0.5


def test_a_large_difference_in_a_small_sample_is_not_significant() -> None:
    live = drawn(3, 6, mean=1000.0)
    planned = drawn(0, 2000)
    assert ks_statistic(planned.prompt_tokens, live.prompt_tokens) > DriftThresholds().length
    assert compare(planned, live, DriftThresholds())[1].strength == 0.0


def test_bursts_are_not_growth() -> None:
    """70 % more arrivals in the window than planned: much for Poisson, little for bursts of cv 8."""
    planned = drawn(0, 2000, rate=5.0)
    calm, bursty = drawn(1, 300, rate=8.5, cv=1.0), drawn(1, 300, rate=8.5, cv=8.0)
    assert compare(planned, calm, DriftThresholds())[0].strength > 1.0
    assert compare(planned, bursty, DriftThresholds())[0].strength == 0.0


def test_cached_tokens_count() -> None:
    stream = RequestStream.make(
        np.arange(400.0),
        np.full(400, 100),
        np.full(400, 10),
        prefix_group=np.zeros(400, dtype=np.int64),
        prefix_tokens=np.full(400, 60),
    )
    planned = WorkloadStats.planned(stream, 1.0)
    snapshot = ProfileSnapshot(0, 400.0, 400, 1.0, 400, (0.0,), (100,) * 400, (10,) * 400, (0,) * 400, (0,) * 400)
    rate, prompt, output, cached = compare(planned, WorkloadStats.live(snapshot), DriftThresholds())
    assert (rate.strength, prompt.strength, output.strength) == (0.0, 0.0, 0.0)
    assert (cached.planned, cached.live) == (0.6, 0.0)
    assert cached.strength == pytest.approx(4.0)


def test_a_window_without_arrivals_has_a_positive_rate() -> None:
    snapshot = ProfileSnapshot(0, 100.0, 0, 1.0, 200, (), (100,) * 200, (10,) * 200, (0,) * 200, (0,) * 200)
    rate = compare(drawn(0, 200), WorkloadStats.live(snapshot), DriftThresholds())[0]
    assert 1.0 < rate.strength < math.inf


def make_slo_file(objective: str) -> SloFile:
    return SloFile.model_validate(
        {
            "model": "tiny",
            "cluster": {"nodes": [{"device": "cpu"}]},
            "slo": [{"ttft_s": 1, "tpot_s": 0.1}],
            "workload": {"dataset": "sharegpt", "rate": 4.0},
            "objective": objective,
        }
    )


def make_plan(rate: float, goodput: float) -> Plan:
    expected = Expected(rate=rate, goodput=goodput, goodput_ci=(goodput, goodput), goodput_per_device=1.0, classes=())
    group = PlanGroup(role="colocated", instances=1, device="cpu", kv_tokens=100)
    assert group.shape == ParallelShape(1, 1)
    return Plan(model="tiny", verdict="colocate", groups=(group,), expected=expected)


@pytest.mark.parametrize(("goodput", "rise"), [(4.0, 1.1), (4.8, 1.2), (40.0, 10.0)])
def test_the_rate_may_rise_to_the_plans_goodput(goodput: float, rise: float) -> None:
    limits = thresholds_for(make_plan(4.0, goodput), make_slo_file("cheapest"))
    assert limits.rate_rise == pytest.approx(rise)
    assert limits.rate_fall == 1.5


def test_a_falling_rate_does_not_matter_for_a_fixed_cluster() -> None:
    limits = thresholds_for(make_plan(4.0, 4.0), make_slo_file("goodput"))
    planned, quiet = drawn(0, 2000, rate=5.0), drawn(1, 2000, rate=0.5)
    assert compare(planned, quiet, limits)[0].strength == 0.0
    assert compare(planned, quiet, thresholds_for(make_plan(4.0, 4.0), make_slo_file("cheapest")))[0].strength > 1.0

"""Predictors: they find the truth, whatever the prior, and stay near it when measurements are disturbed."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.cost_model import StepLoad, attention_pairs
from tandem.core.step_coefficients import StepCoefficients
from tandem.scheduling.predictor import MAX_FACTOR, LinearPredictor, Residuals, StepPredictor, prefill_s
from tests.placement.simulator.deployments import LinearCost

PRIOR = StepCoefficients.of(LinearCost(fixed_s=0.01, token_s=1e-4, kv_s=1e-6))


def random_load(random: Random) -> StepLoad:
    rows, chunk, start = random.randrange(64), random.choice([0, 0, 64, 512]), random.randrange(2048)
    return StepLoad(
        prefill_tokens=chunk,
        prefill_sequences=int(chunk > 0),
        prefill_pairs=attention_pairs(start, chunk),
        decode_sequences=rows + 1,
        decode_kv_tokens=(rows + 1) * random.randrange(1, 2048),
    )


@given(rows=st.integers(1, 4096), kv_tokens=st.integers(0, 10**6))
def test_coefficients_of_a_linear_cost_model_are_exact(rows: int, kv_tokens: int) -> None:
    cost = LinearCost(fixed_s=0.01, token_s=1e-4, kv_s=1e-6)
    for load in (StepLoad.of_decode(rows, kv_tokens), StepLoad(prefill_tokens=rows)):
        assert PRIOR.seconds(load) == pytest.approx(cost.step(load).total_s, rel=1e-6)


@settings(deadline=None, max_examples=10)
@given(factors=st.lists(st.floats(0.3, 3.0), min_size=6, max_size=6), seed=st.integers(0, 1000))
def test_converges_to_the_true_coefficients_in_spite_of_pauses(factors: list[float], seed: int) -> None:
    """One step in 25 is interrupted, the others are off by 5 % each way."""
    truth = StepCoefficients(*(factor * each for factor, each in zip(factors, PRIOR, strict=True)))
    predictor, random = StepPredictor(PRIOR), Random(seed)
    for _ in range(600):
        load = random_load(random)
        pause = random.choice([10.0, 300.0]) if random.random() < 0.04 else random.uniform(0.95, 1.05)
        predictor.observe(load, truth.seconds(load) * pause)
    for _ in range(20):
        load = random_load(random)
        assert predictor.step_s(load) == pytest.approx(truth.seconds(load), rel=0.15)
    assert predictor.residuals.error < 0.15


def test_follows_a_change_of_speed() -> None:
    predictor, random = StepPredictor(PRIOR), Random(1)
    for turn in range(900):
        load = random_load(random)
        predictor.observe(load, PRIOR.seconds(load) * (1.0 if turn < 600 else 2.0))
    load = random_load(random)
    assert predictor.step_s(load) == pytest.approx(2 * PRIOR.seconds(load), rel=0.1)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.tuples(*[st.floats(0, 1e6)] * 3),
            st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(1e-9, 1e9)),
        ),
        max_size=60,
    )
)
def test_no_measurement_breaks_the_bounds(measured: list[tuple[tuple[float, ...], float]]) -> None:
    prior = (1e-3, 1e-5, 0.0)
    predictor = LinearPredictor(prior)
    for terms, seconds in measured:
        predictor.observe(terms, seconds)
        for coefficient, each in zip(predictor.coefficients, prior, strict=True):
            assert each / MAX_FACTOR <= coefficient * 1.000001
            assert coefficient <= each * MAX_FACTOR * 1.000001


@given(st.lists(st.floats(0.1, 10.0), min_size=8, max_size=400))
def test_quantiles_are_those_of_the_recent_residuals(actual: list[float]) -> None:
    residuals = Residuals()
    for seconds in actual:
        residuals.add(1.0, seconds)
    recent = sorted(actual[-128:])
    assert residuals.quantile(0.0) == pytest.approx(recent[0] - 1)
    assert residuals.quantile(0.999) == pytest.approx(recent[-1] - 1)
    assert sum(each - 1 <= residuals.quantile(0.8) for each in recent) >= 0.8 * len(recent)


@given(predicted_s=st.floats(1e-3, 10.0), target_s=st.floats(1e-3, 10.0), more_s=st.floats(0.0, 10.0))
def test_a_laxer_target_is_met_more_often(predicted_s: float, target_s: float, more_s: float) -> None:
    residuals = Residuals(0.1)
    share = residuals.share_within(predicted_s, target_s, 0.05)
    assert 0 <= share <= residuals.share_within(predicted_s, target_s + more_s, 0.05) <= 1
    assert residuals.share_within(predicted_s, float("inf"), 0.05) == 1


@given(uncached=st.integers(1, 10_000), cached=st.integers(0, 10_000), step_tokens=st.integers(16, 4096))
def test_uncached_tokens_are_what_a_prompt_costs(uncached: int, cached: int, step_tokens: int) -> None:
    alone_s = prefill_s(PRIOR, uncached, 0, step_tokens)
    assert alone_s <= prefill_s(PRIOR, uncached, cached, step_tokens) <= prefill_s(PRIOR, uncached + cached, 0, 16)
    assert alone_s >= PRIOR.seconds(StepLoad(prefill_tokens=min(uncached, step_tokens)))

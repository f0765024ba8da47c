"""What is fitted to the samples of a measured cluster."""

from collections.abc import Sequence

import pytest

from tandem.placement.costs.serving import ServedStep
from tandem.placement.costs.step_fit import CalibratedCost
from tandem.profiling.serving_fit import (
    StepTime,
    colocated_prompt_s,
    decode_step_times,
    fit_alone,
    fit_cold_step_factor,
    fit_decode,
    fit_path,
    fit_prefill,
    fit_serving,
)
from tandem.profiling.serving_samples import ColocatedSamples, LoadPeriod, ServingSamples
from tests.profiling.samples import ENGINE, KV_TOKENS, TERMS, cluster_samples, decoding, prompt_s, prompted, step_s


@pytest.mark.parametrize("shares", [(0.0, 1.0), (0.1, 0.8), (0.0, 0.2, 0.9)])
def test_contention_adds_a_constant_and_a_factor(shares: Sequence[float]) -> None:
    alone, contended = ServedStep(constant_s=0.001, factor=1.02), ServedStep(constant_s=0.003, factor=1.2)
    steps = [
        StepTime(engine_s, alone.interpolate(contended, share).seconds(engine_s), share)
        for engine_s in (0.02, 0.1, 0.4)
        for share in shares
    ]
    for fitted, expected in zip(fit_prefill(steps), (alone, contended), strict=True):
        assert (fitted.constant_s, fitted.factor) == pytest.approx((expected.constant_s, expected.factor))


def test_steps_that_were_slowed_by_chance_count_as_much_as_others() -> None:
    served_s = {0.1: (0.10, 0.14), 0.2: (0.22, 0.26)}
    _, contended = fit_prefill([StepTime(engine_s, each, 1.0) for engine_s, both in served_s.items() for each in both])
    assert contended.seconds(0.1) == pytest.approx(0.12), "their mean"
    assert contended.seconds(0.2) == pytest.approx(0.24)


def test_steps_that_other_processes_slowed_are_left_out() -> None:
    usual = [StepTime(0.1, 0.12, 1.0)] * 9 + [StepTime(0.2, 0.24, 1.0)] * 9
    _, contended = fit_prefill([*usual, StepTime(0.1, 0.25, 1.0), StepTime(0.2, 0.6, 1.0)])
    assert contended.seconds(0.1) == pytest.approx(0.12)
    assert contended.seconds(0.2) == pytest.approx(0.24)


def test_a_step_takes_longer_if_a_request_is_admitted_during_it() -> None:
    steps = [
        StepTime(engine_s, (1.1 + 0.1 * share) * engine_s + 0.004 * admitted, share, admitted, count=20)
        for engine_s in (0.006, 0.012)
        for admitted in (0.02, 0.3)
        for share in (0.0, 0.7)
    ]
    alone, contended, request_admission_cost_s = fit_decode(steps)
    assert request_admission_cost_s == pytest.approx(0.004)
    assert (alone.factor, contended.factor) == pytest.approx((1.1, 1.2))
    assert alone.constant_s == contended.constant_s == 0


def test_the_first_step_after_a_pause_takes_longer() -> None:
    alone, contended = ServedStep(factor=1.1), ServedStep(constant_s=0.003, factor=1.2)
    cold = [
        StepTime(engine_s, usual_s * (1 + 0.08 * share), share, is_cold=True)
        for engine_s in (0.05, 0.2)
        for share in (1.0, 0.4, 0.0)
        if (usual_s := alone.interpolate(contended, share).seconds(engine_s))
    ]
    others = [StepTime(0.1, 0.15, 1.0), StepTime(0.1, 0.5, 1.0, is_cold=True)]  # not cold; slowed by other processes
    assert fit_cold_step_factor(alone, contended, cold + others) == pytest.approx(0.08)
    assert fit_cold_step_factor(alone, contended, [StepTime(0.1, 0.05, 1.0, is_cold=True)]) == 0
    assert fit_cold_step_factor(alone, contended, others) == 0


def test_decode_is_compared_with_the_batches_that_there_were() -> None:
    # Two requests of ten steps, five of them in one batch; every step takes 1.5 times as long as predicted.
    alone_s, both_s = 5 * 1.5 * step_s(1), 5 * 1.5 * step_s(2)
    spans = (0.0, alone_s + both_s), (alone_s, alone_s + both_s + alone_s)
    first, second = decode_step_times(ENGINE, LoadPeriod(decoding(10, *spans)))
    for step in (first, second):
        assert step.served_s / step.engine_s == pytest.approx(1.5, rel=0.01), "a bit more: KV is read as fast"
        assert step.count == 10
    assert first.num_admitted == pytest.approx(1 / 10), "the second one, and its KV"
    assert second.num_admitted == 0
    assert first.contended == pytest.approx(0.001 / (alone_s + both_s)), "the second one's prompt"
    assert second.contended == 0


def test_prompted_requests_make_the_batch_larger() -> None:
    alone_s, both_s = 5 * step_s(1), 5 * step_s(2)
    began_s, decode_s = 0.75 * alone_s, both_s - 0.001
    other = prompted(KV_TOKENS - 1, 0.25 * alone_s, began_s=began_s, decode_s=decode_s, num_output_tokens=2)
    (step,) = decode_step_times(ENGINE, LoadPeriod(decoding(10, (0.0, alone_s + both_s)), (other,)))
    assert step.served_s == pytest.approx(step.engine_s, rel=1e-3)
    assert step.num_admitted == pytest.approx(1 / 10)
    assert step.contended == pytest.approx(0.25 * alone_s / (alone_s + both_s))


def test_a_request_whose_client_received_all_at_once_counts_for_no_time() -> None:
    at_once = prompted(8, 0.1, transfer_s=0.02, began_s=0.1, decode_s=-0.02)
    assert at_once.decode_span == pytest.approx((0.22, 0.22))
    mine = decoding(30, (0.0, 30 * step_s(1)))
    (alone,), (both,) = (decode_step_times(ENGINE, LoadPeriod(mine, others)) for others in ((), (at_once,)))
    assert both.engine_s == pytest.approx(alone.engine_s)


def test_requests_of_few_steps_are_left_out() -> None:
    assert decode_step_times(ENGINE, LoadPeriod(decoding(3, (0.0, 3 * step_s(1))))) == []


def test_reading_kv_takes_as_long_in_a_worker() -> None:
    read_s = KV_TOKENS * ENGINE.decode_coefficients(1)[1]
    span = (0.0, 10 * (1.3 * (step_s(1) - read_s) + read_s))
    (step,) = decode_step_times(ENGINE, LoadPeriod(decoding(10, span)))
    assert step.served_s / step.engine_s == pytest.approx(1.3, rel=0.01)
    assert step.engine_s == pytest.approx(step_s(1) - read_s)


def test_what_was_measured_is_what_is_predicted() -> None:
    costs = fit_serving(ENGINE, cluster_samples(ServedStep(constant_s=0.003, factor=1.2), ServedStep(factor=1.3)))
    assert costs.prefill_contended.seconds(0.1) == pytest.approx(0.123)
    assert costs.prefill_alone.seconds(0.1) == pytest.approx(0.1)
    assert costs.decode_contended.seconds(step_s(1)) == pytest.approx(1.3 * step_s(1), rel=0.1), "in whole steps"


def test_a_transfer_has_a_latency_a_speed_and_a_cost_for_each_concurrent_one() -> None:
    """Alone: 4 ms and 10 us a token, of which 1 ms is for the transfer itself. Contended, with decode steps of 20 ms:
    6 ms, and 1 ms for each transfer of the same prefill step."""
    alone = [prompted(n, 0.1, transfer_s=0.004 + n * 1e-5) for n in (32, 32, 64, 160, 256)]
    contended = tuple(
        prompted(n, 0.1, transfer_s=0.006 + together * 0.001 + n * 1e-5 + 0.010, began_s=began_s)
        for began_s, together in ((1.0, 1), (2.0, 3), (3.0, 2))
        for n in (32, 64, 160)[:together]
    )
    samples = ServingSamples(prefill_alone=alone, concurrent=[LoadPeriod(decoding(10, (0.0, 0.2)), contended)])
    costs = fit_path(samples, kv_bytes_per_token=12288.0)
    assert costs.transfer_alone_s == pytest.approx(0.003)
    assert costs.transfer_contended_s == pytest.approx(0.006)
    assert costs.per_concurrent_transfer_s == pytest.approx(0.001)
    assert costs.transfer_bytes_per_s == pytest.approx(12288.0 / 1e-5)
    assert costs.admission_s == pytest.approx(0.004), "until the prefill step began"
    assert costs.first_token_s == pytest.approx(0.002)
    assert costs.token_s == pytest.approx(0.003)


def test_transfers_whose_time_does_not_grow_with_the_prompt_have_a_finite_speed() -> None:
    alone = [prompted(n, 0.1, transfer_s=0.01 - n * 1e-6) for n in (32, 64, 160, 256)]
    concurrent = [LoadPeriod(decoding(10, (0.0, 0.2)), (prompted(32, 0.1, transfer_s=0.02),))]
    costs = fit_path(ServingSamples(prefill_alone=alone, concurrent=concurrent), kv_bytes_per_token=12288.0)
    assert 0 < costs.transfer_bytes_per_s < float("inf")


def decode_period(batch: int, factor: float) -> LoadPeriod:
    """100 steps of `batch` sequences, each of which takes so many times as long as in the engine."""
    read_s = batch * KV_TOKENS * 1e-6
    duration_s = 100 * (factor * (step_s(batch) - read_s) + read_s)
    return LoadPeriod(decoding(100, *[(0.0, duration_s)] * batch), batch=batch)


def test_an_instance_alone_has_a_constant_for_prompts_and_a_factor_for_each_batch_that_decodes() -> None:
    prefill = ServedStep(constant_s=0.004, factor=1.25)
    prompts = tuple(
        prompted(n, prefill.seconds(prompt_s(n)), began_s=10.0 * index) for index, n in enumerate((16, 64, 200, 250))
    )
    factors = {1: 1.8, 4: 1.5, 16: 1.1}
    periods = tuple(decode_period(batch, factor) for batch, factor in factors.items())
    of_prompts, of_decoding = fit_alone(ENGINE, ColocatedSamples(prompts, periods * 2))
    assert (of_prompts.constant_s, of_prompts.factor) == pytest.approx((0.004, 1.25))
    assert dict(of_decoding.by_batch) == pytest.approx(factors, rel=1e-2)
    assert of_decoding.factor == pytest.approx(1.5, rel=1e-2)


def test_a_prompt_alone_passes_two_stages_in_chunks_that_follow_each_other() -> None:
    """A step of a colocated instance has 512 tokens, so with two stages each of two steps under way has 256."""
    half = TERMS.model_copy(update={"linear": tuple((rows, seconds / 2) for rows, seconds in TERMS.linear)})
    staged = CalibratedCost(TERMS, num_stages=2, following=half)
    assert colocated_prompt_s(ENGINE, 500) == prompt_s(500)
    assert colocated_prompt_s(staged, 200) == prompt_s(200)
    assert colocated_prompt_s(staged, 512) == pytest.approx(1.5 * prompt_s(256))
    prompts = tuple(
        prompted(n, 0.004 + 1.25 * colocated_prompt_s(staged, n), began_s=10.0 * index)
        for index, n in enumerate((16, 64, 250, 500))
    )
    of_prompts, _ = fit_alone(staged, ColocatedSamples(prompts, (LoadPeriod(decoding(100, (0.0, 1.0))),)))
    assert (of_prompts.constant_s, of_prompts.factor) == pytest.approx((0.004, 1.25))

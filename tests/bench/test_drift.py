"""How far step times have drifted from a calibration."""

import pytest

from bench.fidelity.live.drift import StepTimeDrift, disturbed_s, drift_in_period
from bench.fidelity.live.runs import request_sample_of
from bench.load.result import LoadRecord
from tandem.placement.costs.serving import ServedStep, ServingCosts
from tandem.profiling.serving_fit import fit_serving
from tests.profiling.samples import ENGINE, calibration, cluster_samples, prompt_s, prompted


def test_steps_that_were_calibrated_have_no_drift() -> None:
    samples = cluster_samples(ServedStep(constant_s=0.003, factor=1.2), ServedStep(factor=1.3))
    costs = fit_serving(ENGINE, samples)
    for period in samples.steady:
        assert drift_in_period(period, calibration(costs)).prefill == pytest.approx(1.0)


@pytest.mark.parametrize(("prefill", "decode", "within"), [(1.05, 0.95, True), (1.07, 1.0, False), (1.0, 0.93, False)])
def test_drift_is_within_a_tolerance_if_both_phases_are(prefill: float, decode: float, within: bool) -> None:
    assert StepTimeDrift(prefill, decode).is_within(0.06) is within


@pytest.mark.parametrize(("slow_s", "factor", "disturbed"), [(0.0, 1.0, 0.0), (6.0, 2.0, 6.0), (6.0, 1.15, 0.0)])
def test_a_disturbance_is_found_in_the_steps_of_a_run(slow_s: float, factor: float, disturbed: float) -> None:
    """A prompt each second; those of `slow_s` from the tenth second on take longer than usual."""
    usual_s = prompt_s(200)
    prompts = [
        prompted(200, usual_s * (factor if 10.0 <= at_s < 10.0 + slow_s else 1.0), began_s=at_s)
        for at_s in map(float, range(30))
    ]
    assert disturbed_s(prompts, calibration(ServingCosts())) == disturbed


def test_a_record_of_a_load_run_becomes_a_sample() -> None:
    parts = {"prefill_s": 0.2, "transfer_s": 0.01, "decode_queue_s": 0.0, "decode_s": 0.5}
    timeline: dict[str, object] = {"parts": parts, "ttft_s": 0.24, "total_s": 0.75}
    record = LoadRecord(3, 9.9, 64, 16, 0, sent_s=10.0, first_s=10.25, last_s=10.77, timeline=timeline)
    sample = request_sample_of(record)
    assert sample is not None
    assert (sample.num_prompt_tokens, sample.client_ttft_s, sample.client_total_s) == pytest.approx((64, 0.25, 0.77))
    assert (sample.prefill_began_s, sample.prefill_ended_s) == pytest.approx((10.05, 10.25))
    assert sample.decode_span == pytest.approx((10.26, 10.77))
    assert request_sample_of(LoadRecord(4, 9.9, 64, 16, 0, sent_s=10.0, error="gone")) is None

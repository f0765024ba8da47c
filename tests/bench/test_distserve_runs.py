import numpy as np
import pytest

from bench.common.distserve_costs import Coefficients, DistServeCost
from bench.fidelity.distserve.experiments import goodput_of
from bench.fidelity.distserve.recorded_runs import RecordedRun, RecordedRuns, fits_to_run, read_runs
from tandem.placement.workload.requests import RequestStream


def test_the_recorded_runs_have_the_means_that_were_recorded_with_them() -> None:
    recorded = read_runs()
    for rate, ttft_ms, tpot_ms in ((1, 161.2004, 34.2467), (2, 221.3240, 61.6749)):
        assert 1e3 * recorded.runs[rate].ttft_s.mean() == pytest.approx(ttft_ms, abs=0.05)
        assert 1e3 * recorded.runs[rate].tpot_s.mean() == pytest.approx(tpot_ms, abs=0.005)


def test_requests_at_another_rate_keep_their_pattern() -> None:
    recorded = read_runs()
    fast = recorded.stream_at(4.0)
    assert fast.arrival_s[-1] == pytest.approx(25.0, rel=1e-3)
    assert fast.arrival_s * 4.0 == pytest.approx(recorded.arrival_s)
    assert fast.prompt_tokens.tolist() == recorded.prompt_tokens.tolist()


def test_a_fit_finds_the_step_times_that_a_run_was_made_with() -> None:
    def latencies(cost: DistServeCost, stream: RequestStream) -> RecordedRun:
        """Of requests that never wait; request i decodes with i others."""
        num_others = np.arange(len(stream))
        return RecordedRun(
            cost.prefill.constant_s + cost.prefill.per_token_s * stream.prompt_tokens,
            cost.small_decode.constant_s + cost.small_decode.per_sequence_s * num_others,
        )

    published = DistServeCost(Coefficients(0.02, 1.5e-4), Coefficients(0.02, 0.0), Coefficients(0.02, 0.0))
    true = DistServeCost(
        Coefficients(0.03, 1.2e-4), Coefficients(0.018, 0.0, per_sequence_s=0.0004), Coefficients(0.02, 0.0)
    )
    prompts, ones = np.linspace(10, 2000, 30).astype(np.int64), np.ones(30, dtype=np.int64)
    recorded = RecordedRuns(np.arange(30.0), prompts, ones, {})
    run = latencies(true, recorded.stream_at(1.0))
    nearest = fits_to_run(published, RecordedRuns(recorded.arrival_s, prompts, ones, {1: run}), latencies)[0]
    found = latencies(nearest, recorded.stream_at(1.0))
    assert found.ttft_s == pytest.approx(run.ttft_s, rel=0.01)
    assert found.tpot_s == pytest.approx(run.tpot_s, rel=0.01)
    assert nearest.large_decode == published.large_decode


def test_goodput_is_where_the_curve_first_crosses() -> None:
    curve = {1.0: 100.0, 2.0: 80.0, 3.0: 95.0}
    assert goodput_of(curve) == pytest.approx(1.5)
    assert goodput_of(curve, 70.0) == 3.0
    assert goodput_of({1.0: 89.0, 2.0: 95.0}) == 0.0

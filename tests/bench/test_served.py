"""What engines served, priced for any overhead, is what simulations of it give; overheads are found again."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.cost_model.served import SLOWDOWNS, ServedPoint, priced, served
from bench.cost_model.served_fit import fit_served
from tandem.core.parallel import ParallelShape
from tandem.core.precision import Precision
from tandem.placement.costs.efficiency import EngineOverhead, efficiency
from tandem.placement.costs.hardware import devices
from tandem.placement.costs.models import model_shape

_DEVICE = devices()["H100-80GB-SXM5"]
_FIT = efficiency(_DEVICE.family)


def _point(concurrency: int, prompt: int, output: int, engine: str = "vllm") -> ServedPoint:
    model = model_shape("Llama-3.1-8B", Precision(weights="fp8"))
    return ServedPoint(engine, _DEVICE, model, ParallelShape(2), prompt, output, concurrency, 1.0, 1.0, False)


def _overhead(step_s: float, sequence_s: float, slowdown: float, latency: float) -> EngineOverhead:
    return EngineOverhead(step_s, sequence_s, 0.0, graph_decode=True, slowdown=slowdown, latency=latency)


@settings(max_examples=4, deadline=None)
@given(
    concurrency=st.integers(1, 8),
    prompt=st.integers(16, 9000),
    output=st.integers(2, 60),
    engine=st.sampled_from(["vllm", "trtllm", "sglang"]),
    step_s=st.floats(0, 0.02),
    sequence_s=st.floats(0, 1e-3),
    slowdown=st.sampled_from(SLOWDOWNS),
    latency=st.floats(0, 2),
)
def test_a_priced_point_is_what_the_simulator_serves(
    concurrency: int,
    prompt: int,
    output: int,
    engine: str,
    step_s: float,
    sequence_s: float,
    slowdown: float,
    latency: float,
) -> None:
    point, overhead = _point(concurrency, prompt, output, engine), _overhead(step_s, sequence_s, slowdown, latency)
    assert priced(point, _FIT).times_s(overhead) == pytest.approx(served(point, _FIT, overhead), rel=1e-6)


def test_an_engines_overheads_are_found_from_what_it_served() -> None:
    truth = _overhead(2e-3, 4e-5, 1.2, 0.7)
    points = []
    for concurrency, prompt, output in ((1, 500, 20), (8, 500, 60), (12, 3000, 20), (12, 100, 60), (4, 9000, 10)):
        blank = _point(concurrency, prompt, output)
        ttft_s, tpot_s = served(blank, _FIT, truth)
        points.append(priced(replace(blank, ttft_s=ttft_s, tpot_s=tpot_s), _FIT))
    found = fit_served(points)
    assert found.step_s == pytest.approx(truth.step_s, rel=0.03)
    assert found.sequence_s == pytest.approx(truth.sequence_s, rel=0.05)
    assert found.slowdown == pytest.approx(truth.slowdown, rel=0.02)

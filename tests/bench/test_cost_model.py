"""Fitting and judging the roofline, on samples made up from known efficiencies."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.cost_model.__main__ import main
from bench.cost_model.fit import errors, fit
from bench.cost_model.samples import OperatorSample
from bench.cost_model.steps import StepSample, fit_overhead
from tandem.core.cost_model import StepLoad
from tandem.core.parallel import ParallelShape
from tandem.placement.costs.efficiency import EngineOverhead, efficiency
from tandem.placement.costs.hardware import devices
from tandem.placement.costs.models import published_models
from tandem.placement.costs.operators import gemm_s

_H100 = devices()["H100-80GB-SXM5"]


def _samples(stretch: float = 1.0) -> list[OperatorSample]:
    """Products as a device would time them whose efficiencies are another's."""
    truth = efficiency("ampere").gemm
    shapes = [(m, n, k) for m in (1, 16, 128, 1024, 8192) for n in (1024, 4096, 16384) for k in (2048, 8192)]
    return [
        OperatorSample(
            "gemm",
            "made up",
            _H100,
            gemm_s(m, n, k, 2.0, _H100, truth) * (stretch if held_out else 1.0),
            lambda to, m=m, n=n, k=k: gemm_s(m, n, k, 2.0, _H100, to.gemm),  # type: ignore[misc]
            held_out,
        )
        for m, n, k in shapes
        for held_out in (False, True)
    ]


def test_a_fit_finds_the_efficiencies_that_made_the_samples() -> None:
    fitted = fit(_samples(), efficiency("hopper"))
    truth = efficiency("ampere").gemm
    assert fitted.gemm.compute == pytest.approx(truth.compute, rel=1e-3)
    assert fitted.gemm.memory == pytest.approx(truth.memory, rel=1e-3)
    assert fitted.gemm.latency_s == pytest.approx(truth.latency_s, rel=1e-2)
    assert fitted.decode_attention == efficiency("hopper").decode_attention  # of which nothing was measured


def test_held_out_samples_judge_but_do_not_fit() -> None:
    samples = _samples(stretch=1.25)
    fitted = fit(samples, efficiency("hopper"))
    (seen, unseen) = errors(samples, {"hopper": fitted})
    assert (seen.held_out, unseen.held_out) == (False, True)
    assert seen.median < 1e-3
    assert unseen.median == pytest.approx(0.2, abs=1e-3)  # predicted is 1 / 1.25 of measured
    assert unseen.bias == pytest.approx(-0.2, abs=1e-3)
    assert seen.count == unseen.count == 30


def test_an_engines_overheads_are_found_from_its_steps() -> None:
    truth = EngineOverhead(4e-3, 50e-6, eager_layer_s=0.3e-3, graph_decode=False, slowdown=1.3, prompt_layer_s=0.1e-3)
    model, shape = published_models()["Llama-3.1-8B"], ParallelShape()
    loads = [StepLoad.of_decode(batch, 500 * batch) for batch in (1, 8, 64, 256)]
    loads += [StepLoad.of_prompts(length) for length in (512, 2048, 8192)]
    blank = [StepSample("made up", "decode", model, _H100, shape, ((load, 1),), 1.0, False) for load in loads]
    families = {"hopper": efficiency("hopper")}
    steps = [replace(step, seconds=step.predict(families["hopper"], truth)) for step in blank]
    found = fit_overhead(steps, families)
    assert found.step_s == pytest.approx(truth.step_s, rel=0.02)
    assert found.sequence_s == pytest.approx(truth.sequence_s, rel=0.02)
    assert found.slowdown == pytest.approx(truth.slowdown, rel=0.02)


def test_missing_measurements_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--data", str(tmp_path)]) == 1
    assert "aic_gemm_vllm.csv.gz is missing; --data must name" in capsys.readouterr().err

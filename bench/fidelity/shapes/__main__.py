"""Simulated against live for one colocated instance of several ranks, under light load.

For each shape: the engine's steps are measured with all ranks, as by `tandem profile`. Then an instance is started, and
gets requests that seldom overlap. The simulator gets the same requests at the same times. What serving adds is measured
on the same instance before and after them, since the speed of a shared machine changes.

Needs a machine with a core for each rank and no other load.

    python -m bench.fidelity.shapes                              1x1, 2x1 and 1x2, about eight minutes
    python -m bench.fidelity.shapes --shapes 2x1 --seconds 20
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import yaml

from bench.fidelity.live.simulation import CHECKPOINT, ENGINE
from bench.load.requests import make_streams
from bench.load.result import GENERATOR_TOO_SLOW, LoadRecord, as_simulation
from tandem.core.config_file import load_config
from tandem.core.cost_model import StepLoad
from tandem.core.errors import TandemError
from tandem.core.instance_section import InstanceSection
from tandem.core.parallel import ParallelShape
from tandem.core.slo_file import SloFile
from tandem.models.random_checkpoint import write_random_checkpoint
from tandem.placement.costs.calibration import Calibration
from tandem.placement.evaluation.summary import parts_of
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Deployment, InstanceSpec, RouterSpec
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import RequestStream
from tandem.profiling.calibrate import calibrate
from tandem.profiling.cluster import ClusterLauncher
from tandem.profiling.errors import MeasurementError
from tandem.profiling.serving_fit import fit_alone, fit_router
from tandem.profiling.serving_profile import measure_running_colocated
from tandem.profiling.serving_samples import ColocatedSamples
from tandem.profiling.shape_profile import settings_of
from tandem.scheduling.budget import COLOCATED_BATCH_TOKENS

_CHECKOUT = Path(__file__).parents[3]
_LOAD = 0.15  # share of the time during which the instance has a request
_MIN_REQUESTS = 12
_PROMPT_TOKENS, _OUTPUT_TOKENS = 120, 24  # means
_WORKLOAD = {
    "prompt_tokens": {"mean": _PROMPT_TOKENS, "cv": 0.8, "min": 16, "max": 480},
    "output_tokens": {"mean": _OUTPUT_TOKENS, "cv": 0.5, "min": 8, "max": 64},
}
_SAMPLES_S = 12.0  # of serving, before and after the requests


@dataclass(frozen=True, slots=True)
class Latencies:
    """Over the requests; parts are means, named as in timelines."""

    ttft_s: float  # mean
    tpot_s: float
    median_ttft_s: float
    median_tpot_s: float
    parts_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class ShapeComparison:
    shape: str
    rate: float
    requests: int
    live: Latencies
    simulated: Latencies

    def error(self, name: str) -> float:
        """Simulated against live, relative."""
        return float(getattr(self.simulated, name) / getattr(self.live, name)) - 1


async def measure(
    model: Path, folder: Path, calibration: Calibration, shape: ParallelShape, seconds: float, seed: int
) -> ShapeComparison:
    """Raises MeasurementError."""
    slo_path = folder / f"slo-{shape}.yaml"
    rate = _light_rate(calibration, shape)
    slo_path.write_text(_slo_text(model, rate))
    count = max(_MIN_REQUESTS, round(rate * seconds))
    stream = make_streams(load_config(slo_path, SloFile), None, (rate,), count, seed)[0][1]
    async with ClusterLauncher(model, checkout=_CHECKOUT) as launcher:
        router = await launcher.start_router()
        await launcher.start_colocated(router, settings_of(ENGINE, shape).model_dump(mode="json"))
        url = f"http://{router.http}"
        before = await measure_running_colocated(url, _SAMPLES_S)
        live = await _load(url, slo_path, stream, rate, folder / f"run-{shape}.json", seed)
        after = await measure_running_colocated(url, _SAMPLES_S)
    samples = ColocatedSamples(before.prompted + after.prompted, before.decoding + after.decoding)
    simulated = simulate(_deployment(calibration, shape, samples), stream)
    return ShapeComparison(str(shape), rate, len(stream), _latencies(live), _latencies(simulated))


def _light_rate(calibration: Calibration, shape: ParallelShape) -> float:
    """At which the instance has a request for `_LOAD` of the time."""
    cost = calibration.engine_cost(shape)
    assert cost is not None, "the shape is in the calibration"
    decode_s = _OUTPUT_TOKENS * cost.step(StepLoad.of_decode(1, _PROMPT_TOKENS)).total_s
    return round(_LOAD / (cost.step(StepLoad.of_prompts(_PROMPT_TOKENS)).total_s + decode_s), 3)


def _slo_text(model: Path, rate: float) -> str:
    return yaml.safe_dump(
        {
            "model": str(model),
            "cluster": {"nodes": [{"device": "cpu", "devices": 2}]},
            "slo": [{"ttft_s": 1.0, "tpot_s": 0.1}],
            "workload": {**_WORKLOAD, "rate": rate},
        }
    )


async def _load(
    url: str, slo_path: Path, stream: RequestStream, rate: float, record: Path, seed: int
) -> SimulationResult:
    """Runs `bench.load` in a process of its own."""
    command = [sys.executable, "-m", "bench.load", "--url", url, "--slo", str(slo_path), "--timelines"]
    command += ["--rates", str(rate), "--requests", str(len(stream)), "--seed", str(seed), "--json", str(record)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=_CHECKOUT)
    output, _ = await process.communicate()
    if process.returncode not in (0, GENERATOR_TOO_SLOW):  # which matters little under light load
        raise MeasurementError(f"bench.load ended with {process.returncode}: {output.decode()[-400:]}")
    with record.open("rb") as file:
        report = json.load(file)["runs"][0]
    return as_simulation(stream, [LoadRecord(**fields) for fields in report["requests"]], report["duration_s"])


def _deployment(calibration: Calibration, shape: ParallelShape, samples: ColocatedSamples) -> Deployment:
    """One colocated instance that has the machine for itself."""
    engine = calibration.engine_cost(shape)
    assert engine is not None
    serving = calibration.serving.with_steps_alone(*fit_alone(engine, samples))
    cost = calibration.with_serving(shape, serving).cost(shape, contended=0.0)
    assert cost is not None
    instance = InstanceSpec(
        "colocated-0",
        "colocated",
        cost,
        num_blocks=int(calibration.kv_memory_bytes // (calibration.kv_bytes_per_token * ENGINE.block_size)),
        block_size=ENGINE.block_size,
        max_batch_tokens=COLOCATED_BATCH_TOKENS,
        max_batch=InstanceSection().max_batch,
        shape=shape,
    )
    return Deployment((instance,), router=RouterSpec(*fit_router(samples.prompted)))


def _latencies(result: SimulationResult) -> Latencies:
    return Latencies(
        ttft_s=float(np.nanmean(result.ttft_s)),
        tpot_s=float(np.nanmean(result.tpot_s)),
        median_ttft_s=float(np.nanmedian(result.ttft_s)),
        median_tpot_s=float(np.nanmedian(result.tpot_s)),
        parts_s={name: float(values.mean()) for name, values in parts_of(result).items()},
    )


def as_text(comparisons: Sequence[ShapeComparison]) -> str:
    """A table in Markdown: live, simulated and their relative difference."""
    lines = [
        "| shape | requests | TTFT live | simulated | | TPOT live | simulated | |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in comparisons:
        figures = [str(one.requests)]
        for name in ("ttft_s", "tpot_s"):
            figures += [f"{1e3 * getattr(side, name):.1f} ms" for side in (one.live, one.simulated)]
            figures.append(f"{one.error(name):+.1%}")
        lines.append(f"| {one.shape} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fidelity.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", default="1x1,2x1,1x2", help="tp x pp (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=45.0, help="of requests to each shape (default: %(default)s)")
    parser.add_argument("--engine-seconds", type=float, default=30.0, help="of steps of one rank; others get a third")
    parser.add_argument("--repetitions", type=int, default=1, help="of all shapes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="tandem-shapes-") as name:
        folder = Path(name)
        try:
            shapes = [ParallelShape.parse(text) for text in args.shapes.split(",")]
            model = write_random_checkpoint(folder / "model", CHECKPOINT, dtype="bfloat16")
            for repetition in range(args.repetitions):
                calibration = calibrate(
                    model,
                    ENGINE,
                    today=datetime.now(UTC).date(),
                    engine_s=args.engine_seconds,
                    serving_s=0.0,
                    shapes=[shape for shape in shapes if shape.num_ranks > 1],
                )
                comparisons = [
                    asyncio.run(measure(model, folder, calibration, shape, args.seconds, args.seed + repetition))
                    for shape in shapes
                ]
                print(as_text(comparisons))
                print(json.dumps([asdict(one) for one in comparisons]), flush=True)
        except (TandemError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

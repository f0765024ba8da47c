"""Simulated against live for one colocated instance of several ranks.

For each shape: the engine's steps are measured with all ranks, as by `tandem profile`. Then an instance is started. In
turns, what serving adds is measured as `tandem profile` does it, and the instance gets requests that seldom overlap
(light load). The simulator gets the same requests at the same times. The two take turns because the speed of a shared
machine changes: both meet the same machine, and no request is in both. Instances of several pipeline stages also get
many requests at once, so that each stage computes another step.

Needs a machine with a core for each rank and no other load.

    python -m bench.fidelity.shapes                              1x1, 2x1 and 1x2, about eight minutes
    python -m bench.fidelity.shapes --shapes 2x1 --rounds 3

The last line is JSON: also the calibration, every request, and the samples beside their fit.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bench.fidelity.live.simulation import CHECKPOINT, ENGINE
from bench.fidelity.shapes.details import probes_beside_fit, requests_beside
from bench.load.run import run_load
from tandem.core.cost_model import StepLoad
from tandem.core.errors import TandemError
from tandem.core.instance_section import InstanceSection
from tandem.core.parallel import ParallelShape
from tandem.core.slo import SloClass
from tandem.core.slo_file import WorkloadSection
from tandem.models.random_checkpoint import write_random_checkpoint
from tandem.placement.costs.calibration import Calibration
from tandem.placement.evaluation.summary import parts_of
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Deployment, InstanceSpec, RouterSpec
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.streams import make_stream
from tandem.profiling.calibrate import calibrate
from tandem.profiling.cluster import MODEL_NAME, ClusterLauncher
from tandem.profiling.completion_client import CompletionClient
from tandem.profiling.serving_fit import fit_alone, fit_router
from tandem.profiling.serving_profile import measure_running_colocated
from tandem.profiling.serving_samples import ColocatedSamples
from tandem.profiling.shape_profile import settings_of
from tandem.scheduling.budget import COLOCATED_BATCH_TOKENS

_CHECKOUT = Path(__file__).parents[3]
_LOAD = 0.3  # share of the time during which the instance has a request
_PROMPT_TOKENS, _OUTPUT_TOKENS = 120, 24  # means
_WORKLOAD = WorkloadSection.model_validate(
    {
        "prompt_tokens": {"mean": _PROMPT_TOKENS, "cv": 0.8, "min": 16, "max": 480},
        "output_tokens": {"mean": _OUTPUT_TOKENS, "cv": 0.5, "min": 8, "max": 64},
    }
)
_CLASSES = (SloClass(ttft_s=1.0, tpot_s=0.1),)  # nothing is decided by them
_SAMPLES_S = 6.0  # of serving, in each round
_REQUESTS = 8  # in each round
_AT_ONCE = 40  # requests, more than twice as many as decode in one step of a pipeline
_ROUNDS_AT_ONCE = 3
_AT_ONCE_RATE = 1000.0  # per second
_HEAD = (
    "| shape, load, requests | | TTFT live | simulated | | TPOT live | simulated | |",
    "|---|---|--:|--:|--:|--:|--:|--:|",
)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Over the requests; parts are means, named as in timelines."""

    ttft_s: float  # mean
    tpot_s: float
    median_ttft_s: float
    median_tpot_s: float
    parts_s: dict[str, float]

    @classmethod
    def of(cls, results: Sequence[SimulationResult]) -> "Latencies":
        ttft_s = np.concatenate([result.ttft_s for result in results])
        tpot_s = np.concatenate([result.tpot_s for result in results])
        parts = [parts_of(result) for result in results]
        return cls(
            ttft_s=float(np.nanmean(ttft_s)),
            tpot_s=float(np.nanmean(tpot_s)),
            median_ttft_s=float(np.nanmedian(ttft_s)),
            median_tpot_s=float(np.nanmedian(tpot_s)),
            parts_s={name: float(np.mean([one[name].mean() for one in parts])) for name in parts[0]},
        )


@dataclass(frozen=True, slots=True)
class ShapeComparison:
    shape: str
    load: str
    rate: float
    requests: int
    live: Latencies
    simulated: Latencies

    def error(self, name: str) -> float:
        """Simulated against live, relative."""
        return float(getattr(self.simulated, name) / getattr(self.live, name)) - 1


@dataclass(frozen=True, slots=True)
class Comparisons:
    """Of one shape, by load. `details`: every request, live and simulated, and the samples beside the fit, as JSON."""

    by_load: tuple[ShapeComparison, ...]
    details: dict[str, Any]


async def compare(model: Path, calibration: Calibration, shape: ParallelShape, rounds: int, seed: int) -> Comparisons:
    """Raises MeasurementError."""
    rate = _light_rate(calibration, shape)
    streams = {"light": [_stream(_REQUESTS, rate, seed + i) for i in range(rounds)]}
    if shape.pp > 1:
        seeds = range(seed + rounds, seed + rounds + _ROUNDS_AT_ONCE)
        streams["at once"] = [_stream(_AT_ONCE, _AT_ONCE_RATE, each) for each in seeds]
    samples, live = ColocatedSamples(), dict[str, list[SimulationResult]]()
    async with ClusterLauncher(model, checkout=_CHECKOUT) as launcher:
        router = await launcher.start_router()
        await launcher.start_colocated(router, settings_of(ENGINE, shape).model_dump(mode="json"))
        url = f"http://{router.http}"
        for load, of_load in streams.items():
            for stream in of_load:
                if load == "light":
                    samples += await measure_running_colocated(url, _SAMPLES_S)
                live.setdefault(load, []).append(await _send(url, stream))
    engine = calibration.engine_cost(shape)
    assert engine is not None, "the shape is in the calibration"
    serving = calibration.serving.with_steps_alone(*fit_alone(engine, samples))
    deployment = _deployment(calibration.with_serving(shape, serving), shape, samples)
    comparisons, details = [], dict[str, Any](probes=probes_beside_fit(engine, serving, samples))
    for load, of_load in streams.items():
        simulated = [simulate(deployment, stream) for stream in of_load]
        count = sum(map(len, of_load))
        rate = rate if load == "light" else _AT_ONCE_RATE
        comparisons.append(
            ShapeComparison(str(shape), load, rate, count, Latencies.of(live[load]), Latencies.of(simulated))
        )
        details[load] = [requests_beside(one, other) for one, other in zip(live[load], simulated, strict=True)]
    return Comparisons(tuple(comparisons), details)


def _stream(count: int, rate: float, seed: int) -> RequestStream:
    return make_stream(_WORKLOAD, _CLASSES, count=count, rate=rate, seed=seed)


def _light_rate(calibration: Calibration, shape: ParallelShape) -> float:
    """At which the instance has a request for `_LOAD` of the time."""
    cost = calibration.engine_cost(shape)
    assert cost is not None, "the shape is in the calibration"
    decode_s = _OUTPUT_TOKENS * cost.step(StepLoad.of_decode(1, _PROMPT_TOKENS)).total_s
    return _LOAD / (cost.step(StepLoad.of_prompts(_PROMPT_TOKENS)).total_s + decode_s)


async def _send(url: str, stream: RequestStream) -> SimulationResult:
    client = CompletionClient(url)
    try:
        return (await run_load(client, stream, MODEL_NAME, with_timelines=True)).as_simulation()
    finally:
        client.close()


def _deployment(calibration: Calibration, shape: ParallelShape, samples: ColocatedSamples) -> Deployment:
    """One colocated instance that has the machine for itself."""
    cost = calibration.cost(shape, contended=0.0)
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


def _rows(one: ShapeComparison) -> Iterator[str]:
    """Of the table in Markdown: live, simulated and their relative difference, of means and medians."""
    for kind, names in (("mean", ("ttft_s", "tpot_s")), ("median", ("median_ttft_s", "median_tpot_s"))):
        figures: list[str] = []
        for name in names:
            figures += [f"{1e3 * getattr(side, name):.1f} ms" for side in (one.live, one.simulated)]
            figures.append(f"{one.error(name):+.1%}")
        yield f"| {one.shape}, {one.load}, {one.requests} | {kind} | {' | '.join(figures)} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fidelity.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", default="1x1,2x1,1x2", help="tp x pp (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="of requests to each shape (default: %(default)s)")
    parser.add_argument("--engine-seconds", type=float, default=30.0, help="of steps of one rank; others get a third")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and arrivals (default: %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="tandem-shapes-") as folder:
        try:
            shapes = [ParallelShape.parse(text) for text in args.shapes.split(",")]
            model = write_random_checkpoint(Path(folder, "model"), CHECKPOINT, dtype="bfloat16")
            calibration = calibrate(
                model,
                ENGINE,
                today=datetime.now(UTC).date(),
                engine_s=args.engine_seconds,
                serving_s=0.0,
                shapes=[shape for shape in shapes if shape.num_ranks > 1],
            )
            print("\n".join(_HEAD))
            comparisons: list[ShapeComparison] = []
            details: dict[str, Any] = {"calibration": calibration.model_dump(mode="json")}
            for shape in shapes:
                found = asyncio.run(compare(model, calibration, shape, args.rounds, args.seed))
                for one in found.by_load:
                    print("\n".join(_rows(one)), flush=True)
                comparisons += found.by_load
                details[str(shape)] = found.details
        except (TandemError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
    print(json.dumps({"comparisons": [asdict(one) for one in comparisons], "details": details}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

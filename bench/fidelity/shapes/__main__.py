"""Simulated against live for one colocated instance of several ranks.

For each shape: the engine's steps are measured with all ranks, as by `tandem profile`. Then an instance is started. In
turns, what serving adds is measured as `tandem profile` does it, and the instance gets requests: two that may overlap
(light load), and many at once. The simulator gets the same requests at the same times; no request is in both.

A machine that is shared with others is up to three times slower at some moments than at others. So everything is
repeated, and its fastest third counts, on both sides (`live.py`): this compares the simulator with the instance, not
the machine with itself.

Needs a machine with a core for each rank and no other load.

    python -m bench.fidelity.shapes                              1x1, 2x1 and 1x2, 12 minutes
    python -m bench.fidelity.shapes --shapes 2x1 --repeats 3

The last line is JSON: also the calibration, every request, and the samples beside their fit.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bench.fidelity.live.simulation import CHECKPOINT, ENGINE
from bench.fidelity.shapes.details import probes_beside_fit, requests_beside
from bench.fidelity.shapes.live import num_counted, serve_repeatedly
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
from tandem.placement.workload.requests import Floats, RequestStream
from tandem.placement.workload.streams import make_stream
from tandem.profiling.calibrate import calibrate
from tandem.profiling.cluster import ClusterLauncher
from tandem.profiling.serving_fit import fit_alone, fit_router
from tandem.profiling.serving_samples import ColocatedSamples
from tandem.profiling.shape_profile import settings_of
from tandem.scheduling.budget import COLOCATED_BATCH_TOKENS

_CHECKOUT = Path(__file__).parents[3]
_PROMPT_TOKENS, _OUTPUT_TOKENS = 120, 24  # means
_WORKLOAD = WorkloadSection.model_validate(
    {
        "prompt_tokens": {"mean": _PROMPT_TOKENS, "cv": 0.8, "min": 16, "max": 480},
        "output_tokens": {"mean": _OUTPUT_TOKENS, "cv": 0.5, "min": 8, "max": 64},
    }
)
_CLASSES = (SloClass(ttft_s=1.0, tpot_s=0.1),)  # nothing is decided by them
_PAIR_S = 0.6  # a request takes 0.3 s
_AT_ONCE = 40  # more than twice as many as decode in one step of a pipeline
_AT_ONCE_RATE = 1000.0  # per second
_PAIRS = 10
_JITTER_S = 0.02  # more than a step takes
_GOOD_FIT = 0.05  # median error of the engine's costs; more where the machine was disturbed for long
_CALIBRATIONS = 4  # at most
_HEAD = (
    "| shape, load, requests | | TTFT live | simulated | | TPOT live | simulated | |",
    "|---|---|--:|--:|--:|--:|--:|--:|",
)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Over the requests; each counts with the mean of the fastest third of its repeats. Parts are means of all repeats,
    named as in timelines."""

    ttft_s: float  # mean
    tpot_s: float
    median_ttft_s: float
    median_tpot_s: float
    parts_s: dict[str, float]

    @classmethod
    def of(cls, streams: Sequence[Sequence[SimulationResult]]) -> "Latencies":
        """Of each stream, the repeats."""
        ttft_s = np.concatenate([_fastest_of_each([one.ttft_s for one in repeats]) for repeats in streams])
        tpot_s = np.concatenate([_fastest_of_each([one.tpot_s for one in repeats]) for repeats in streams])
        parts = [parts_of(result) for repeats in streams for result in repeats]
        return cls(
            ttft_s=float(np.mean(ttft_s)),
            tpot_s=float(np.mean(tpot_s)),
            median_ttft_s=float(np.median(ttft_s)),
            median_tpot_s=float(np.median(tpot_s)),
            parts_s={name: float(np.mean([one[name].mean() for one in parts])) for name in parts[0]},
        )


def _fastest_of_each(repeats: Sequence[Floats]) -> Floats:
    """Of each request, the mean of its fastest repeats."""
    return np.asarray(np.sort(np.stack(repeats), axis=0)[: num_counted(len(repeats))].mean(axis=0))


@dataclass(frozen=True, slots=True)
class ShapeComparison:
    shape: str
    load: str
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


async def compare(model: Path, calibration: Calibration, shape: ParallelShape, repeats: int, seed: int) -> Comparisons:
    """Raises MeasurementError."""
    streams = [_pair(seed + index) for index in range(_PAIRS)]
    streams.append(make_stream(_WORKLOAD, _CLASSES, count=_AT_ONCE, rate=_AT_ONCE_RATE, seed=seed + _PAIRS))
    async with ClusterLauncher(model, checkout=_CHECKOUT) as launcher:
        router = await launcher.start_router()
        await launcher.start_colocated(router, settings_of(ENGINE, shape).model_dump(mode="json"))
        live = await serve_repeatedly(f"http://{router.http}", streams, repeats)
    engine = calibration.engine_cost(shape)
    assert engine is not None, "the shape is in the calibration"
    serving = calibration.serving.with_steps_alone(*fit_alone(engine, live.samples))
    deployment = _deployment(calibration.with_serving(shape, serving), shape, live.samples)
    comparisons, details = [], dict[str, Any](probes=probes_beside_fit(engine, serving, live.samples))
    random = np.random.default_rng(seed)
    for load, rows in (("light", slice(_PAIRS)), ("at once", slice(_PAIRS, None))):
        measured = live.results[rows]
        simulated = [
            [simulate(deployment, _jittered(stream, random)) for _ in range(repeats)] for stream in streams[rows]
        ]
        requests = sum(map(len, streams[rows]))
        comparisons.append(ShapeComparison(str(shape), load, requests, Latencies.of(measured), Latencies.of(simulated)))
        details[load] = [
            [requests_beside(*both) for both in zip(*repeated, strict=True)]
            for repeated in zip(measured, simulated, strict=True)
        ]
    return Comparisons(tuple(comparisons), details)


def _pair(seed: int) -> RequestStream:
    """Two requests, the second one up to `_PAIR_S` after the first."""
    gap_s = np.random.default_rng(seed).uniform(0.0, _PAIR_S)
    return make_stream(_WORKLOAD, _CLASSES, count=2, rate=1 / gap_s, seed=seed).scaled_to(1 / gap_s)


def _jittered(stream: RequestStream, random: np.random.Generator) -> RequestStream:
    """Live, later requests come at another moment of the running step in each repeat."""
    jitter_s = np.where(np.arange(len(stream)) > 0, random.uniform(0.0, _JITTER_S), 0.0)
    return replace(stream, arrival_s=stream.arrival_s + jitter_s)


def _undisturbed_calibration(model: Path, shapes: Sequence[ParallelShape], engine_s: float) -> Calibration:
    """Of the engine alone; repeated while the fit says that the machine was disturbed. Raises as `calibrate`."""
    of_several = [shape for shape in shapes if shape.num_ranks > 1]
    today = datetime.now(UTC).date()
    found: list[Calibration] = []
    for _ in range(_CALIBRATIONS):
        found.append(calibrate(model, ENGINE, today=today, engine_s=engine_s, serving_s=0.0, shapes=of_several))
        print(f"median error of the engine's costs: {_fit_error(found[-1]):.1%}", file=sys.stderr)
        if _fit_error(found[-1]) <= _GOOD_FIT:
            break
    return min(found, key=_fit_error)


def _fit_error(calibration: Calibration) -> float:
    return max(calibration.error.median, max((shape.error.median for shape in calibration.shapes), default=0.0))


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
    parser.add_argument("--repeats", type=int, default=9, help="of each stream (default: %(default)s)")
    parser.add_argument("--engine-seconds", type=float, default=45.0, help="of steps of one rank; others get a third")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and arrivals (default: %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="tandem-shapes-") as folder:
        try:
            shapes = [ParallelShape.parse(text) for text in args.shapes.split(",")]
            model = write_random_checkpoint(Path(folder, "model"), CHECKPOINT, dtype="bfloat16")
            calibration = _undisturbed_calibration(model, shapes, args.engine_seconds)
            print("\n".join(_HEAD))
            comparisons: list[ShapeComparison] = []
            details: dict[str, Any] = {"calibration": calibration.model_dump(mode="json")}
            for shape in shapes:
                found = asyncio.run(compare(model, calibration, shape, args.repeats, args.seed))
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

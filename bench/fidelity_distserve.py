"""The simulator beside the curves that DistServe published (OSDI 2024, Figure 8), and its steady state beside both.

OPT-13B and OPT-66B on ShareGPT, DistServe and its baseline vLLM 0.2.3, at the paper's placements and targets, with the
published coefficients (`placement.costs.published`). The coefficients were fitted on wall times through Ray; the Ray
overhead that DistServe's own simulator adds once more is left out.

The experiments sent a few hundred requests a point, which is a transient, and the lengths that they drew are not
published. So each point is simulated with as many requests, drawn from the published means, for many seeds: the table
gives the mean over seeds and the range that holds nine seeds of ten, in which a single experiment should lie. Goodput
is where the curve crosses 90 %, by straight lines between the rates of the figure, as the paper reads it.

    python -m bench.fidelity_distserve --seeds 8      a minute
    python -m bench.fidelity_distserve --write        all, and the section of docs/fidelity.md
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.fidelity_page import PAGE, markdown_table, write_section
from core.parallel import ParallelShape
from core.slo import SloClass
from core.slo_file import WorkloadSection
from placement.costs.published import DEVICE, DistServeSource, Engine
from placement.judging.goodput import goodput_at
from placement.simulator import simulate
from placement.simulator.deployment import Deployment, InstanceSpec, Role
from placement.workload.requests import Floats
from placement.workload.streams import make_stream

_CURVES = Path("reference") / "distserve_slo_attainment_curves.csv"
_WORKLOAD = WorkloadSection(dataset="distserve_sharegpt")
_MAX_MODEL_LEN = 2048
_BLOCK_TOKENS = 16
_STEADY_REQUESTS = 4000


@dataclass(frozen=True, slots=True)
class Group:
    role: Role
    shape: ParallelShape


@dataclass(frozen=True, slots=True)
class Experiment:
    """One curve of the figure. `num_requests` is what its authors sent at each rate."""

    model: str
    system: str
    engine: Engine
    groups: tuple[Group, ...]
    slo: SloClass
    num_requests: int

    @property
    def num_devices(self) -> int:
        return sum(group.shape.num_ranks for group in self.groups)

    def deployment(self) -> Deployment:
        """Limits of a step as in the paper's runs: 8192 prompt tokens for DistServe, vLLM 0.2.3's defaults for vLLM."""
        source = DistServeSource(self.model, self.engine, ray_overhead=False)
        instances = []
        for group in self.groups:
            cost = source.cost_model(DEVICE, group.shape)
            assert cost is not None, "the figure's shapes have coefficients"
            is_baseline = group.role == "colocated"
            spec = InstanceSpec(
                instance_id=group.role,
                role=group.role,
                cost=cost,
                num_blocks=source.kv_tokens(DEVICE, group.shape) // _BLOCK_TOKENS,
                block_size=_BLOCK_TOKENS,
                max_model_len=_MAX_MODEL_LEN,
                max_batch_tokens=2560 if is_baseline else 8192,
                max_batch=256 if is_baseline else 1024,
                policy="prompt_first",
                growth_horizon_tokens=0,
            )
            instances.append(spec)
        return Deployment(tuple(instances))


def _shape(text: str) -> ParallelShape:
    return ParallelShape.parse(text)


_SLO_13B, _SLO_66B = SloClass(ttft_s=0.25, tpot_s=0.1), SloClass(ttft_s=2.5, tpot_s=0.15)
EXPERIMENTS = (
    Experiment(
        "OPT-13B",
        "DistServe",
        "distserve",
        (Group("prefill", _shape("tp2")), Group("decode", _shape("tp1"))),
        _SLO_13B,
        300,
    ),
    Experiment("OPT-13B", "vLLM", "vllm", (Group("colocated", _shape("tp1")),), _SLO_13B, 100),
    Experiment(
        "OPT-66B",
        "DistServe",
        "distserve",
        (Group("prefill", _shape("tp4")), Group("decode", _shape("tp2pp2"))),
        _SLO_66B,
        200,
    ),
    Experiment("OPT-66B", "vLLM", "vllm", (Group("colocated", _shape("tp4")),), _SLO_66B, 100),
)


@dataclass(frozen=True, slots=True)
class Point:
    """Attainments in percent. `simulated` has one entry for each seed."""

    rate_per_device: float
    published: float
    simulated: Floats

    @property
    def mean(self) -> float:
        return float(self.simulated.mean())

    @property
    def usual_range(self) -> tuple[float, float]:
        low, high = np.percentile(self.simulated, [5, 95])
        return float(low), float(high)


def published_curve(data: Path, model: str, system: str) -> dict[float, float]:
    """Rate per device -> attainment in percent. Raises FileNotFoundError."""
    with (data / _CURVES).open(encoding="utf-8", newline="") as file:
        return {
            float(row["x"]): float(row["slo_attainment_pct"])
            for row in csv.DictReader(file)
            if (row["figure"], row["model"], row["workload"], row["system"]) == ("Fig8-top", model, "ShareGPT", system)
            and row["slo_attainment_pct"]
        }


def attainment_pct(experiment: Experiment, rate_per_device: float, seed: int) -> float:
    """Of all requests sent, as the experiments counted; the start is not cut off."""
    slo = experiment.slo
    stream = make_stream(
        _WORKLOAD, (slo,), count=experiment.num_requests, rate=rate_per_device * experiment.num_devices, seed=seed
    )
    result = simulate(experiment.deployment(), stream)
    met = (result.ttft_s <= slo.ttft_s) & (np.isnan(result.tpot_s) | (result.tpot_s <= slo.tpot_s)) & result.finished
    return 100.0 * float(met.mean())


def steady_goodput(experiment: Experiment) -> float:
    """Requests per second and device at 90 % in steady state."""
    deployment = experiment.deployment()
    stream = make_stream(_WORKLOAD, (experiment.slo,), count=_STEADY_REQUESTS, rate=1.0, seed=0)
    found = goodput_at(
        lambda requests, stop: simulate(deployment, requests, stop_when=stop),
        stream,
        (experiment.slo,),
        guess=experiment.num_devices * 1.0,
    )
    return found.rate / experiment.num_devices


def goodput_of(curve: dict[float, float], target_pct: float = 90.0) -> float:
    """Where the curve falls below the target for the first time; the last rate if it never does."""
    previous: tuple[float, float] | None = None
    for rate, attainment in sorted(curve.items()):
        if attainment < target_pct:
            if previous is None:
                return 0.0
            before_rate, before = previous
            return before_rate + (rate - before_rate) * (before - target_pct) / (before - attainment)
        previous = (rate, attainment)
    return max(curve)


def measure(data: Path, seeds: int, workers: int) -> dict[Experiment, tuple[list[Point], float]]:
    """Points of every experiment, and its goodput in steady state."""
    curves = {experiment: published_curve(data, experiment.model, experiment.system) for experiment in EXPERIMENTS}
    results = {}
    with ProcessPoolExecutor(workers) as pool:
        steady = {experiment: pool.submit(steady_goodput, experiment) for experiment in EXPERIMENTS}
        runs = {
            (experiment, rate): [pool.submit(attainment_pct, experiment, rate, seed) for seed in range(seeds)]
            for experiment, curve in curves.items()
            for rate in curve
        }
        with tqdm(total=len(runs) * seeds, unit="run", disable=not sys.stderr.isatty()) as bar:
            for experiment, curve in curves.items():
                points = []
                for rate, published in curve.items():
                    simulated = []
                    for run in runs[experiment, rate]:
                        simulated.append(run.result())
                        bar.update()
                    points.append(Point(rate, published, np.array(simulated)))
                results[experiment] = (points, steady[experiment].result())
    return results


_PREAMBLE = """\
`python -m bench.fidelity_distserve`: OPT-13B and OPT-66B on ShareGPT, TTFT 0.25 s and TPOT 0.1 s, or 2.5 s and 0.15
s, on A100s at the paper's placements (OSDI 2024, Figure 8). Step times are its published coefficients. Each point
has as many requests as the experiment, which is a transient; the lengths are drawn anew from the published means
for many seeds, since the experiment's own are not published. Aim: attainment within 5 points up to the knee (90 %),
goodput within 10 %.

The published curve of vLLM on OPT-13B lies at exactly 90 % at its two lowest rates, so that a simulated mean a few
points lower has no goodput at all: there only the curve can be compared. On OPT-66B vLLM was slower between answers
than its own coefficients say (all that is missed there is TPOT), by what is not known; prompts padded to their
batch's longest, as vLLM 0.2.3 computed them, and the overhead of Ray, which lowers the simulated goodput to 0.46,
are not modelled."""


def render(results: dict[Experiment, tuple[list[Point], float]]) -> str:
    """The section, as Markdown."""
    lines = [_PREAMBLE, ""]
    goodputs: list[tuple[str, ...]] = []
    for experiment, (points, steady) in results.items():
        shapes = " + ".join(f"{group.role} {group.shape}" for group in experiment.groups)
        lines += [f"**{experiment.model}, {experiment.system}** ({shapes}; {experiment.num_requests} requests)", ""]
        header = ("req/s per GPU", "published %", "simulated %", "difference", "nine seeds of ten", "inside")
        lines += [*markdown_table(header, [_row(point) for point in points]), ""]
        published = goodput_of({point.rate_per_device: point.published for point in points})
        simulated = goodput_of({point.rate_per_device: point.mean for point in points})
        error = f"{100 * (simulated / published - 1):+.1f} %"
        name = f"{experiment.model} {experiment.system}"
        goodputs.append((name, f"{published:.3f}", f"{simulated:.3f}", error, f"{steady:.3f}"))
    lines += ["Goodput at 90 %, requests per second and GPU:", ""]
    lines += markdown_table(("", "published", "simulated transient", "error", "simulated steady state"), goodputs)
    return "\n".join(lines)


def _row(point: Point) -> tuple[str, ...]:
    low, high = point.usual_range
    return (
        f"{point.rate_per_device:g}",
        f"{point.published:.1f}",
        f"{point.mean:.1f}",
        f"{point.mean - point.published:+.1f}",
        f"{low:.0f} to {high:.0f}",
        "yes" if low <= point.published <= high else "no",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fidelity_distserve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="has reference/ (%(default)s)")
    parser.add_argument("--seeds", type=int, default=40, help="simulations of each point (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--write", action="store_true", help=f"write the section of {PAGE.name}")
    options = parser.parse_args(arguments)
    if not (options.data / _CURVES).exists():
        print(f"{options.data / _CURVES} does not exist; give the data folder with --data", file=sys.stderr)
        return 1
    text = render(measure(options.data, options.seeds, options.workers))
    print(text)
    if options.write:
        write_section("DistServe's published curves", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

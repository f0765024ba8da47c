"""The experiments behind DistServe's published curves (OSDI 2024, Figure 8), as deployments for the simulator."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.common.distserve_costs import DEVICE, DistServeCost, DistServeEngine, DistServeSource
from bench.fidelity.distserve.padded_scheduler import PADDED
from bench.fidelity.distserve.recorded_runs import RecordedRuns, fits_to_run
from tandem.core.instance_section import RoleName
from tandem.core.parallel import ParallelShape
from tandem.core.slo import SloClass
from tandem.core.slo_file import WorkloadSection
from tandem.placement.evaluation.goodput import find_goodput
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Deployment, InstanceSpec
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.streams import make_stream

CURVES = Path("reference") / "distserve_slo_attainment_curves.csv"
_WORKLOAD = WorkloadSection(dataset="distserve_sharegpt")
_MAX_MODEL_LEN = 2048
_BLOCK_TOKENS = 16
_STEADY_REQUESTS = 4000


@dataclass(frozen=True, slots=True)
class ExperimentGroup:
    role: RoleName
    shape: ParallelShape


@dataclass(frozen=True, slots=True)
class Experiment:
    """One curve of the figure. `num_requests`: sent at each rate. `cost`: of every instance, instead of the published
    coefficients."""

    model: str
    system: str
    engine: DistServeEngine
    groups: tuple[ExperimentGroup, ...]
    slo: SloClass
    num_requests: int
    cost: DistServeCost | None = None

    @property
    def is_baseline(self) -> bool:
        return self.system == "vLLM"

    @property
    def num_devices(self) -> int:
        return sum(group.shape.num_ranks for group in self.groups)

    def deployment(self) -> Deployment:
        """With the step limits of the scripts of the paper's runs."""
        source = DistServeSource(self.model, self.engine, ray_overhead=False)
        instances = []
        for group in self.groups:
            cost = self.cost or source.cost_model(DEVICE, group.shape)
            assert cost is not None, "the figure's shapes have coefficients"
            spec = InstanceSpec(
                instance_id=group.role,
                role=group.role,
                cost=cost,
                num_blocks=source.kv_tokens(DEVICE, group.shape) // _BLOCK_TOKENS,
                block_size=_BLOCK_TOKENS,
                max_model_len=_MAX_MODEL_LEN,
                max_batch_tokens=65536 if self.is_baseline else 8192,
                max_batch=1024,
                growth_horizon_tokens=0,
                **(PADDED if self.is_baseline else {}),
            )
            instances.append(spec)
        return Deployment(tuple(instances))


_SLO_13B, _SLO_66B = SloClass(ttft_s=0.25, tpot_s=0.1), SloClass(ttft_s=2.5, tpot_s=0.15)
EXPERIMENTS = (
    Experiment(
        "OPT-13B",
        "DistServe",
        "distserve",
        (ExperimentGroup("prefill", ParallelShape(2)), ExperimentGroup("decode", ParallelShape(1))),
        _SLO_13B,
        300,
    ),
    Experiment("OPT-13B", "vLLM", "vllm", (ExperimentGroup("colocated", ParallelShape(1)),), _SLO_13B, 100),
    Experiment(
        "OPT-66B",
        "DistServe",
        "distserve",
        (ExperimentGroup("prefill", ParallelShape(4)), ExperimentGroup("decode", ParallelShape(2, 2))),
        _SLO_66B,
        200,
    ),
    Experiment("OPT-66B", "vLLM", "vllm", (ExperimentGroup("colocated", ParallelShape(4)),), _SLO_66B, 100),
)


def published_curve(data: Path, model: str, system: str) -> dict[float, float]:
    """Rate per device -> attainment in percent. Raises FileNotFoundError."""
    with (data / CURVES).open(encoding="utf-8", newline="") as file:
        return {
            float(row["x"]): float(row["slo_attainment_pct"])
            for row in csv.DictReader(file)
            if (row["figure"], row["model"], row["workload"], row["system"]) == ("Fig8-top", model, "ShareGPT", system)
            and row["slo_attainment_pct"]
        }


def attainment_pct(slo: SloClass, result: SimulationResult) -> float:
    """Of all requests, including the warm-up, as in the experiments."""
    met = (result.ttft_s <= slo.ttft_s) & (np.isnan(result.tpot_s) | (result.tpot_s <= slo.tpot_s)) & result.finished
    return 100.0 * float(met.mean())


def drawn_attainment_pct(experiment: Experiment, rate_per_device: float, seed: int) -> float:
    rate = rate_per_device * experiment.num_devices
    stream = make_stream(_WORKLOAD, (experiment.slo,), count=experiment.num_requests, rate=rate, seed=seed)
    return attainment_pct(experiment.slo, simulate(experiment.deployment(), stream))


def fitted(experiment: Experiment, recorded: RecordedRuns) -> list[Experiment]:
    """The experiment with step times fitted to the recorded run of its model and engine, the nearest fit first."""

    def simulate_with(cost: DistServeCost, stream: RequestStream) -> SimulationResult:
        return simulate(replace(experiment, cost=cost).deployment(), stream)

    (published,) = (instance.cost for instance in experiment.deployment().instances)
    assert isinstance(published, DistServeCost)
    return [replace(experiment, cost=cost) for cost in fits_to_run(published, recorded, simulate_with)]


def steady_goodput(experiment: Experiment) -> float:
    """Requests per second and device at 90 % in steady state."""
    deployment = experiment.deployment()
    stream = make_stream(_WORKLOAD, (experiment.slo,), count=_STEADY_REQUESTS, rate=1.0, seed=0)
    goodput = find_goodput(
        lambda requests, stop: simulate(deployment, requests, stop_when=stop),
        stream,
        (experiment.slo,),
        guess=experiment.num_devices * 1.0,
    )
    return goodput / experiment.num_devices


def goodput_of(curve: dict[float, float], target_pct: float = 90.0) -> float:
    """The rate where the curve first falls below the target; the last rate if it never does."""
    previous: tuple[float, float] | None = None
    for rate, attainment in sorted(curve.items()):
        if attainment < target_pct:
            if previous is None:
                return 0.0
            before_rate, before = previous
            return before_rate + (rate - before_rate) * (before - target_pct) / (before - attainment)
        previous = (rate, attainment)
    return max(curve)

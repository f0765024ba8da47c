"""Two plans on the same requests: at each rate the differences are those of the plans, not of chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tandem.core.errors import ConfigError
from tandem.core.plan import Plan
from tandem.core.slo_file import SloFile
from tandem.placement.cluster import Cluster
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.sources import cost_source_of
from tandem.placement.evaluation.attainment import Evaluation, evaluate, evaluate_windows, targets_met
from tandem.placement.evaluation.steady_state import Interval, mean_interval
from tandem.placement.plan_deployment import deployment_of
from tandem.placement.search.mapper import Mapper
from tandem.placement.simulator import simulate
from tandem.placement.workload.requests import Floats, RequestStream
from tandem.placement.workload.streams import generated_requests, trace_requests
from tandem.placement.workload.windows import Window, windowed

_WARM_UP_SHARE = 0.25
_MIN_REQUESTS = 40  # of which differences have an interval


@dataclass(frozen=True, slots=True)
class ComparedPlan:
    """A plan with the SLO file that it was made for, which has its cluster. `cost_per_hour` in USD."""

    name: str
    plan: Plan
    slo_file: SloFile

    @property
    def cost_per_hour(self) -> float | None:
        used: dict[str, int] = {}
        for group in self.plan.groups:
            used[group.device] = used.get(group.device, 0) + group.num_devices
        return Cluster.of(self.slo_file.cluster).price_per_hour(used)


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean of each plan, and the 95 % interval of the first one's minus the second one's. None: there is none."""

    means: tuple[float, float]
    interval: Interval | None

    @property
    def is_certain(self) -> bool:
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True, slots=True)
class ComparedRate:
    """Both plans at `rate`: their evaluations, and differences over the requests of the whole run without its first
    quarter. `attainment` is the share that met both targets; TTFT and TPOT in seconds, of requests that both plans
    finished."""

    rate: float
    evaluations: tuple[Evaluation, Evaluation]
    cached_shares: tuple[float, float]
    attainment: Difference
    ttft_s: Difference
    tpot_s: Difference


@dataclass(frozen=True, slots=True)
class _Run:
    evaluation: Evaluation
    cached_share: float
    met: Floats
    ttft_s: Floats
    tpot_s: Floats


@dataclass(frozen=True, slots=True)
class _Workload:
    slo_file: SloFile
    stream: RequestStream
    windows: tuple[Window, ...]


def compare_plans(
    plans: tuple[ComparedPlan, ComparedPlan], slo_file: SloFile, rates: Sequence[float], mapper: Mapper
) -> list[ComparedRate]:
    """Both plans at each of `rates`, with the workload and the targets of `slo_file`. Raises ConfigError."""
    if plans[0].plan.model != plans[1].plan.model:
        raise ConfigError(f"the plans are for two models, {plans[0].plan.model} and {plans[1].plan.model}")
    workload = _workload_of(slo_file, plans)
    trials = [(plan, rate) for rate in rates for plan in plans]
    runs = mapper(partial(_run, workload), trials)
    return [_compared(rate, *pair) for rate, pair in zip(rates, zip(runs[::2], runs[1::2], strict=True), strict=True)]


def _workload_of(slo_file: SloFile, plans: Sequence[ComparedPlan]) -> _Workload:
    search, workload = slo_file.search, slo_file.workload
    limit = model_shape(plans[0].plan.model, plans[0].plan.precision).max_context_tokens
    if workload.trace is not None:
        trace = trace_requests(workload, slo_file.slo, seed=search.seed, max_context_tokens=limit)
        divided = windowed(trace.requests, search.requests, whole=True)
        return _Workload(slo_file, divided.stream, divided.windows)
    counts = [plan.plan.expected.requests or 0 for plan in plans if plan.plan.expected is not None]
    generated = generated_requests(
        workload,
        slo_file.slo,
        count=max(search.requests, *counts, 0),
        rate=1.0,
        seed=search.seed,
        max_context_tokens=limit,
    )
    return _Workload(slo_file, generated.requests, ())


def _run(workload: _Workload, trial: tuple[ComparedPlan, float]) -> _Run:
    compared, rate = trial
    own, classes = compared.slo_file, workload.slo_file.slo
    model = model_shape(compared.plan.model, compared.plan.precision)
    cluster = Cluster.of(own.cluster)
    requests = workload.stream.scaled_to(rate)
    result = simulate(deployment_of(compared.plan, cost_source_of(own, model), cluster, model), requests)
    if workload.windows:
        evaluation = evaluate_windows(result, classes, workload.windows, workload.slo_file.workload.cover)
    else:
        evaluation = evaluate(result, classes)
    steady = slice(int(_WARM_UP_SHARE * len(requests)), None)
    met = targets_met(result, classes).astype(np.float64)
    return _Run(evaluation, result.cached_share, met[steady], result.ttft_s[steady], result.tpot_s[steady])


def _compared(rate: float, first: _Run, second: _Run) -> ComparedRate:
    return ComparedRate(
        rate,
        (first.evaluation, second.evaluation),
        (first.cached_share, second.cached_share),
        _difference(first.met, second.met),
        _difference(first.ttft_s, second.ttft_s),
        _difference(first.tpot_s, second.tpot_s),
    )


def _difference(first: Floats, second: Floats) -> Difference:
    both = ~np.isnan(first) & ~np.isnan(second)
    if both.sum() < _MIN_REQUESTS:
        return Difference((float("nan"), float("nan")), None)
    first, second = first[both], second[both]
    return Difference((float(first.mean()), float(second.mean())), mean_interval(first - second))

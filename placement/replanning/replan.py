"""Planning again for the requests as they are: what would change, and what it would gain over the plan that runs."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem.core.plan import Plan, PlanGroup
from tandem.core.slo import SloClass
from tandem.core.slo_file import SloFile
from tandem.placement.cluster import Cluster
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.sources import cost_source_of
from tandem.placement.evidence import Planned
from tandem.placement.judging.goodput import StopWhen, goodput_at, stop_when_lost
from tandem.placement.judging.judgement import judge
from tandem.placement.plan_deployment import deployment_of
from tandem.placement.replanning.live_workload import SPARE_REQUESTS
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Deployment
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.streams import make_stream

PlanFor = Callable[[SloFile], Planned]


@dataclass(frozen=True, slots=True)
class Forecast:
    """How a plan would do on some requests. `goodput` in requests per second of the whole plan; `attainment` is the
    share of requests on time at the rate asked for, of the class that has least to spare, and `meets` whether all
    classes keep theirs at that rate."""

    goodput: float
    attainment: float
    meets: bool


@dataclass(frozen=True, slots=True)
class Replan:
    """The planner's answer beside the plan that runs, both on the live requests. `gain`: see `gain_of`. `regains`: the
    plan that runs would miss its targets at the live rate, the new one would keep them."""

    planned: Planned
    current: Forecast
    gain: float
    regains: bool
    changes: tuple[str, ...]


def replan(current: Plan, slo_file: SloFile, rate: float, plan_for: PlanFor) -> Replan:
    """`slo_file` has the live workload, which comes at `rate`. Raises ConfigError if a plan cannot run there."""
    forecast = forecast_of(current, slo_file, rate)
    planned = plan_for(slo_file)
    proposed, gain, meets = planned.plan, 0.0, False
    if proposed.groups and proposed.verdict != "infeasible":
        rival = forecast_of(proposed, slo_file, rate)  # by the same measure, not by what its own search says
        gain, meets = gain_of((current, forecast), (proposed, rival), slo_file), rival.meets
    return Replan(
        planned=planned,
        current=forecast,
        gain=gain,
        regains=meets and not forecast.meets,
        changes=changes_between(current, proposed),
    )


def forecast_of(plan: Plan, slo_file: SloFile, rate: float) -> Forecast:
    """Simulates the plan as it is on the workload of `slo_file`, at `rate` and at what it can take."""
    model = model_shape(slo_file.model)
    deployment = deployment_of(plan, cost_source_of(slo_file, model), Cluster.of(slo_file.cluster), model)
    search, classes = slo_file.search, slo_file.slo
    requests = make_stream(
        slo_file.workload, classes, count=SPARE_REQUESTS * search.requests, rate=rate, seed=search.seed
    )

    def run(stream: RequestStream, _: StopWhen) -> SimulationResult:
        return _run_steady(deployment, requests.scaled_to(stream.rate), classes, search.requests)

    few = requests.head(search.requests)
    at_rate = judge(simulate(deployment, requests), classes)
    least = min(at_rate.classes, key=lambda judged: judged.margin)
    return Forecast(goodput_at(run, few, classes, guess=rate).rate, least.attainment, at_rate.meets)


def _run_steady(
    deployment: Deployment, requests: RequestStream, classes: Sequence[SloClass], count: int
) -> SimulationResult:
    """The first `count` requests, and more of them where these would not show a steady state: as the planner does."""
    while True:
        stream = requests.head(count)
        result = simulate(deployment, stream, stop_when=stop_when_lost(stream, classes))
        if result.stopped_early or count >= len(requests) or judge(result, classes).long_enough:
            return result
        count *= 2


def gain_of(current: tuple[Plan, Forecast], proposed: tuple[Plan, Forecast], slo_file: SloFile) -> float:
    """Relative. Goodput per device; or, where the cheapest plan was asked for and the one that runs would do, cost.
    Infinite where the plan that runs would have no goodput at all."""
    (before, now), (after, then) = current, proposed
    if slo_file.objective == "cheapest" and now.meets:
        cost_before, cost_after = _costs(before, after)
        return cost_before / cost_after - 1.0
    if now.goodput == 0:
        return math.inf
    return (then.goodput / after.num_devices) / (now.goodput / before.num_devices) - 1.0


def _costs(current: Plan, proposed: Plan) -> tuple[float, float]:
    """USD per hour, or devices where one of the plans has no price."""
    before = current.expected.cost_per_hour if current.expected else None
    after = proposed.expected.cost_per_hour if proposed.expected else None
    if before is None or after is None:
        return float(current.num_devices), float(proposed.num_devices)
    return before, after


def changes_between(current: Plan, proposed: Plan) -> tuple[str, ...]:
    """One sentence for each kind of instance whose number differs; empty if only settings do."""
    before, after = _instances(current), _instances(proposed)
    kinds = list(dict.fromkeys((*before, *after)))
    return tuple(f"{kind}: {before[kind]} -> {after[kind]}" for kind in kinds if before[kind] != after[kind])


def _instances(plan: Plan) -> Counter[str]:
    counts: Counter[str] = Counter()
    for group in plan.groups:
        counts[_kind(group)] += group.instances
    return counts


def _kind(group: PlanGroup) -> str:
    return f"{group.role} {group.shape} on {group.device}"

"""Planning again for the live workload: the gain of the new plan and the changes of instances."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tandem.core.plan import Plan, PlanGroup
from tandem.core.slo_file import SloFile
from tandem.placement.evidence import Planned
from tandem.placement.plan_deployment import deployment_of
from tandem.placement.planner import problem_of
from tandem.placement.search.trial import evaluate_plan_at, find_rate_of_plan

PlanFor = Callable[[SloFile], Planned]


@dataclass(frozen=True, slots=True)
class Forecast:
    """The simulation of a plan on a workload. `goodput` in requests per second of the whole plan. At the workload's
    rate: `attainment` of the class with the smallest margin, and whether all classes `meet` their attainment."""

    goodput: float
    attainment: float
    meets: bool


@dataclass(frozen=True, slots=True)
class PlanComparison:
    """The new plan and the running plan on the live workload. `gain`: see `gain_of`. `regains`: at the live rate the
    running plan misses its targets and the new plan meets them."""

    planned: Planned
    current: Forecast
    gain: float
    regains: bool
    changes: tuple[str, ...]


def replan(current: Plan, slo_file: SloFile, rate: float, plan_for: PlanFor) -> PlanComparison:
    """`slo_file` has the live workload with the rate `rate`. Raises ConfigError if a plan does not fit the cluster."""
    planned = plan_for(slo_file)
    proposed, gain, meets = planned.plan, 0.0, False
    guess = rate if proposed.expected is None else proposed.expected.goodput
    forecast = forecast_of(current, slo_file, rate, guess)
    if proposed.groups and proposed.verdict != "infeasible":
        proposed_forecast = forecast_of(proposed, slo_file, rate, guess)  # same method as for the running plan
        gain = gain_of((current, forecast), (proposed, proposed_forecast), slo_file)
        meets = proposed_forecast.meets
    return PlanComparison(
        planned=planned,
        current=forecast,
        gain=gain,
        regains=meets and not forecast.meets,
        changes=changes_between(current, proposed),
    )


def forecast_of(plan: Plan, slo_file: SloFile, rate: float, guess: float) -> Forecast:
    """Simulates the plan on the workload of `slo_file`, at `rate` and at rates from `guess` to its goodput, as the
    planner does: the same requests, rates and windows. So from the same guess a plan has the goodput that its search
    found, also where runs are too short for a steady state, from which the rate does not go up."""
    problem = problem_of(slo_file)
    deployment = deployment_of(plan, problem.source, problem.cluster, problem.model)
    at_rate = evaluate_plan_at(problem, deployment, rate, stop_early=False)
    worst = min(at_rate.classes, key=lambda result: result.margin)
    goodput = find_rate_of_plan(problem, deployment, guess).rate
    if goodput == 0:  # far below the guess
        goodput = find_rate_of_plan(problem, deployment, rate).rate
    return Forecast(goodput, worst.attainment, at_rate.meets)


def gain_of(current: tuple[Plan, Forecast], proposed: tuple[Plan, Forecast], slo_file: SloFile) -> float:
    """The relative gain in goodput per device; in cost if the objective is `cheapest` and the running plan meets its
    targets. Infinite if the running plan has no goodput."""
    (current_plan, current_forecast), (proposed_plan, proposed_forecast) = current, proposed
    if slo_file.objective == "cheapest" and current_forecast.meets:
        current_cost, proposed_cost = _costs(current_plan, proposed_plan)
        return current_cost / proposed_cost - 1.0
    if current_forecast.goodput == 0:
        return math.inf
    current_goodput = current_forecast.goodput / current_plan.num_devices
    return (proposed_forecast.goodput / proposed_plan.num_devices) / current_goodput - 1.0


def _costs(current: Plan, proposed: Plan) -> tuple[float, float]:
    """USD per hour; numbers of devices if one of the plans has no price."""
    before = current.expected.cost_per_hour if current.expected else None
    after = proposed.expected.cost_per_hour if proposed.expected else None
    if before is None or after is None:
        return float(current.num_devices), float(proposed.num_devices)
    return before, after


def changes_between(current: Plan, proposed: Plan) -> tuple[str, ...]:
    """'KIND: BEFORE -> AFTER' for each kind of instance whose number changes; empty if only settings change."""
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

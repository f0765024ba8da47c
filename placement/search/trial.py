"""Full simulations of a fleet on rising rates: the last word on what it reaches.

Rates are rungs of one ladder that all fleets share, 2.5 % apart, and every rate has the same requests with their
arrivals stretched (common random numbers), so that two fleets differ by what they are and not by luck.

A fleet of many instances is tried on a smaller one of nearly the same proportions: thousands of instances say nothing
about a ratio that six do not say.
"""

import math
from dataclasses import dataclass

from core.plan import Plan
from placement.judging.goodput import Evaluation, Judgement, StopWhen, judge, stop_when_lost
from placement.plan_deployment import deployment_of
from placement.search.fleet import Fleet, Pool
from placement.search.problem import Problem
from placement.search.room import places
from placement.simulator import simulate
from placement.simulator.deployment import Deployment
from placement.simulator.result import SimulationResult
from placement.workload.requests import RequestStream

LADDER_STEP = 1.025
MOST_INSTANCES = 6
_MOST_DOUBLINGS = 4
_FURTHEST = 4.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """`rung`: the highest that passed, None if none did down to where it was given up. `evaluations` ascend in rate."""

    rung: int | None
    evaluations: tuple[Evaluation, ...]

    @property
    def rate(self) -> float:
        """Requests per second that passed, 0 if none did."""
        return 0.0 if self.rung is None else rate_of(self.rung)


def rate_of(rung: int) -> float:
    """Requests per second."""
    return float(LADDER_STEP**rung)


def rung_below(rate: float) -> int:
    """The highest rung of at most this rate."""
    return math.floor(math.log(rate) / math.log(LADDER_STEP) + 1e-9)


def trial_of(fleet: Fleet) -> Fleet:
    """The fleet itself, or a small one of its proportions."""
    if fleet.num_instances <= MOST_INSTANCES:
        return fleet
    if fleet.same_node:
        units = max(1, MOST_INSTANCES // (fleet.num_instances // fleet.units))
        pools = tuple(Pool(pool.kind, pool.instances // fleet.units * units) for pool in fleet.pools)
        return Fleet(pools, units=units, span=fleet.span)
    part = MOST_INSTANCES / fleet.num_instances
    return Fleet(tuple(Pool(pool.kind, max(1, round(pool.instances * part))) for pool in fleet.pools))


def plan_of(problem: Problem, fleet: Fleet, *, apart: bool = False) -> Plan:
    """A plan with devices, and nothing said about it yet."""
    return Plan(
        model=problem.model.name,
        verdict={"disaggregated": "disaggregate", "colocated": "colocate", "mixed": "mixed"}[fleet.layout],
        groups=fleet.groups(places(fleet, problem.cluster, apart=apart)),
        same_node=fleet.same_node,
    )


def run(
    problem: Problem, fleet: Fleet, rate: float, *, apart: bool = False, whole: bool = False
) -> tuple[SimulationResult, Judgement]:
    """At `rate` requests per second; with more requests than asked for where these would not show a steady state.
    `apart`: as a part of a larger fleet. Given up when it cannot pass any more, unless the `whole` run is wanted."""
    deployment = _deployment(problem, fleet, apart=apart)
    count = problem.section.requests
    for _ in range(_MOST_DOUBLINGS):
        requests = problem.requests.head(count).scaled_to(rate)
        stop_when = None if whole else stop_when_lost(requests, problem.classes)
        result = simulate(deployment, requests, stop_when=stop_when)
        judgement = judge(result, problem.classes)
        if judgement.long_enough or result.stopped_early or count >= len(problem.requests):
            break
        count *= 2
    return result, judgement


def simulated(problem: Problem, fleet: Fleet, requests: RequestStream, stop_when: StopWhen) -> SimulationResult:
    """`fleet` on other requests, as `placement.judging.goodput` wants it."""
    return simulate(_deployment(problem, fleet), requests, stop_when=stop_when)


def climb(problem: Problem, fleet: Fleet, guess: float, at_least: float, *, apart: bool = False) -> Outcome:
    """The highest rung that passes, above `at_least` if that is given; else from the rung below `guess` on, and not
    below a quarter of it.

    One rung at a time, up while it passes or down until it does: so a fleet that passes wherever another one does never
    ends below it.
    """
    lowest = rung_below(at_least or guess / _FURTHEST) + 1
    rung = lowest if at_least else max(rung_below(guess), lowest)
    tried: dict[int, Judgement] = {}

    def passes(step: int) -> bool:
        _, tried[step] = run(problem, fleet, rate_of(step), apart=apart)
        return tried[step].meets

    if passes(rung):
        while passes(rung + 1):
            rung += 1
    else:
        rung -= 1
        while rung >= lowest and not passes(rung):
            rung -= 1
    evaluations = tuple(Evaluation(rate_of(step), tried[step]) for step in sorted(tried))
    return Outcome(rung if rung >= lowest else None, evaluations)


def _deployment(problem: Problem, fleet: Fleet, *, apart: bool = False) -> Deployment:
    plan = plan_of(problem, fleet, apart=apart)
    return deployment_of(plan, problem.source, problem.cluster, problem.model, classes=problem.classes)

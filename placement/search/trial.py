"""Full simulations of a fleet on rising rates: the last word on what it reaches.

Rates are rungs of one ladder that all fleets share, 2.5 % apart, and every rate has the same requests with their
arrivals stretched (common random numbers), so that two fleets differ by what they are and not by luck.

A fleet of many instances is tried on a smaller one of nearly the same proportions: thousands of instances say nothing
about a ratio that six do not say.
"""

import math
from dataclasses import dataclass
from functools import partial

from tandem.core.plan import Plan
from tandem.placement.judging.goodput import Evaluation, Judgement, StopWhen, judge, stop_when_lost
from tandem.placement.plan_deployment import deployment_of
from tandem.placement.search.fleet import Fleet, Pool
from tandem.placement.search.parallel import Mapper, Serial
from tandem.placement.search.problem import Problem
from tandem.placement.search.room import places
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Deployment
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import RequestStream

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


def climb(
    problem: Problem, fleet: Fleet, guess: float, at_least: float, mapper: Mapper | None = None, *, apart: bool = False
) -> Outcome:
    """The highest rung that passes, above `at_least` if that is given; else from the rung below `guess` on, and not
    below a quarter of it.

    One rung at a time, up while it passes or down until it does: so a fleet that passes wherever another one does never
    ends below it. `mapper` looks at as many of the next rungs at once as it has workers; what that finds beyond the
    last rung needed is not told, so that the outcome is the same.
    """
    lowest = rung_below(at_least or guess / _FURTHEST) + 1
    start = lowest if at_least else max(rung_below(guess), lowest)
    spread = mapper or Serial()
    tried: dict[int, Judgement] = {}

    def passes(rung: int, step: int) -> bool:
        if rung not in tried:
            ahead = [rung + step * i for i in range(spread.workers) if rung + step * i >= lowest]
            tried.update(zip(ahead, spread(partial(_judgement, problem, fleet, apart), ahead), strict=True))
        return tried[rung].meets

    rung = start
    if passes(rung, 1):
        while passes(rung + 1, 1):
            rung += 1
        needed = range(start, rung + 2)
    else:
        while rung >= lowest and not passes(rung, -1):
            rung -= 1
        needed = range(max(rung, lowest), start + 1)
    evaluations = tuple(Evaluation(rate_of(one), tried[one]) for one in needed)
    return Outcome(rung if rung >= lowest else None, evaluations)


def _judgement(problem: Problem, fleet: Fleet, apart: bool, rung: int) -> Judgement:
    return run(problem, fleet, rate_of(rung), apart=apart)[1]


def _deployment(problem: Problem, fleet: Fleet, *, apart: bool = False) -> Deployment:
    plan = plan_of(problem, fleet, apart=apart)
    return deployment_of(plan, problem.source, problem.cluster, problem.model)

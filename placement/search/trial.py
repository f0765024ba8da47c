"""Full simulations of a deployment at a series of rates.

Rates come from one geometric series for all deployments, 2.5 % apart, and all rates use the same requests with scaled
arrivals: deployments are compared on common random numbers.

A deployment of many instances is represented by a smaller one of nearly the same proportions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from tandem.core.plan import Plan
from tandem.placement.evaluation.attainment import Evaluation, evaluate, evaluate_windows, targets_met
from tandem.placement.evaluation.goodput import StopWhen, stop_when_lost, stop_when_windows_lost
from tandem.placement.plan_deployment import deployment_of
from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.mapper import Mapper, SerialMapper
from tandem.placement.search.packing import assign_devices
from tandem.placement.search.problem import Problem
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Deployment
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import RequestStream
from tandem.scheduling.routing_settings import RoutingSettings

RATE_RATIO = 1.025
MAX_TRIAL_INSTANCES = 6
_MAX_DOUBLINGS = 4
_MAX_DECREASE = 4.0
_SINGLE_STEPS = 12  # down from a guess, before the steps get longer


@dataclass(frozen=True, slots=True)
class MaxRate:
    """`rate`: requests per second, 0 if no tested rate meets the targets. `evaluated` has the evaluation of each
    simulated rate."""

    rate: float
    num_simulations: int
    evaluated: Mapping[float, Evaluation] = field(default_factory=dict, compare=False)


def rate_at(rate_index: int) -> float:
    """Requests per second."""
    return float(RATE_RATIO**rate_index)


def rate_index_below(rate: float) -> int:
    """The index of the highest rate of the series that is at most `rate`."""
    return math.floor(math.log(rate) / math.log(RATE_RATIO) + 1e-9)


def _rate_index(rate: float) -> int:
    return round(math.log(rate) / math.log(RATE_RATIO))


def _is_of_series(rate: float) -> bool:
    return math.isclose(rate, rate_at(_rate_index(rate)), rel_tol=1e-12)


def scaled_down(deployment: CandidateDeployment) -> CandidateDeployment:
    """The deployment, or a small deployment of its proportions if it has many instances."""
    if deployment.num_instances <= MAX_TRIAL_INSTANCES:
        return deployment
    if deployment.same_node:
        return deployment.with_units(max(1, MAX_TRIAL_INSTANCES // (deployment.num_instances // deployment.units)))
    part = MAX_TRIAL_INSTANCES / deployment.num_instances
    return CandidateDeployment(
        tuple(InstanceGroup(group.kind, max(1, round(group.instances * part))) for group in deployment.groups)
    )


def plan_of(problem: Problem, deployment: CandidateDeployment, *, separate_nodes: bool = False) -> Plan:
    """A plan with devices and without predictions. `separate_nodes`: see `assign_devices`."""
    return Plan(
        model=problem.model.name,
        verdict={"disaggregated": "disaggregate", "colocated": "colocate", "mixed": "mixed"}[deployment.layout],
        groups=deployment.plan_groups(assign_devices(deployment, problem.cluster, separate_nodes=separate_nodes)),
        slo=problem.classes,
        same_node=deployment.same_node,
        kv_codec=problem.kv_codec if deployment.sends_kv else "none",
    )


def simulate_at(
    problem: Problem,
    deployment: CandidateDeployment,
    rate: float,
    *,
    separate_nodes: bool = False,
    stop_early: bool = True,
) -> tuple[SimulationResult, Evaluation]:
    """A simulation at `rate` requests per second, with more requests than configured if a steady state needs them, or
    of all windows of a trace.
    `stop_early`: stop once the targets are certainly missed."""
    return _simulate_at(problem, _deployment(problem, deployment, separate_nodes=separate_nodes), rate, stop_early)


def _simulate_at(
    problem: Problem, simulated: Deployment, rate: float, stop_early: bool
) -> tuple[SimulationResult, Evaluation]:
    if problem.windows:
        requests, windows, cover = problem.requests.scaled_to(rate), problem.windows, problem.cover
        stop_when = stop_when_windows_lost(requests, problem.classes, windows, cover) if stop_early else None
        result = simulate(simulated, requests, stop_when=stop_when)
        return result, evaluate_windows(result, problem.classes, windows, cover)
    count = problem.section.requests
    for _ in range(_MAX_DOUBLINGS):
        requests = problem.requests.head(count).scaled_to(rate)
        stop_when = stop_when_lost(requests, problem.classes) if stop_early else None
        result = simulate(simulated, requests, stop_when=stop_when)
        evaluation = evaluate(result, problem.classes)
        if evaluation.long_enough or result.stopped_early or count >= len(problem.requests):
            break
        count *= 2
    return result, evaluation


def evaluate_at(problem: Problem, deployment: CandidateDeployment, separate_nodes: bool, rate: float) -> Evaluation:
    """The evaluation of `simulate_at`, with arguments in an order for `functools.partial`. It has `met` if the run was
    complete."""
    result, evaluation = simulate_at(problem, deployment, rate, separate_nodes=separate_nodes)
    return evaluation if result.stopped_early else replace(evaluation, met=targets_met(result, problem.classes))


def simulate_requests(
    problem: Problem, deployment: CandidateDeployment, requests: RequestStream, stop_when: StopWhen
) -> SimulationResult:
    """A simulation of other requests: a `placement.evaluation.goodput.SimulateRequests` by `functools.partial`."""
    return simulate(_deployment(problem, deployment), requests, stop_when=stop_when)


def find_max_rate(
    problem: Problem,
    deployment: CandidateDeployment,
    guess: float,
    at_least: float,
    mapper: Mapper | None = None,
    *,
    at_most: float = math.inf,
    separate_nodes: bool = False,
) -> MaxRate:
    """The highest rate of the series that meets the targets. With `at_least` > 0 only higher rates are tested, from the
    lowest; otherwise rates from below `guess`, down to a thousandth of it. The first rate above `at_most` is the last.

    The rate goes up one index while it meets the targets, or down one index until it does. So a deployment that meets
    the targets wherever another one does never has a lower maximum. Far below the guess the steps get longer, see
    `find_rate_near`. It does not go up from a run without a steady state: few requests can be served in one burst,
    however fast they come. `mapper` simulates the next rates in parallel; rates beyond the last one needed do not
    count, so the result does not depend on the number of workers.
    """
    lowest = rate_index_below(at_least or guess / _MAX_DECREASE) + 1
    start = lowest if at_least else max(rate_index_below(guess), lowest)
    spread = mapper or SerialMapper()
    evaluated: dict[int, Evaluation] = {}

    def meets(rate_index: int, step: int) -> bool:
        if rate_index not in evaluated:
            following = (rate_index + step * i for i in range(spread.workers))
            ahead = [index for index in following if index >= lowest]
            evaluate_rate = partial(evaluate_at, problem, deployment, separate_nodes)
            evaluated.update(zip(ahead, spread(evaluate_rate, [rate_at(index) for index in ahead]), strict=True))
        return evaluated[rate_index].meets

    rate_index = start
    if meets(rate_index, 1):
        while evaluated[rate_index].long_enough and rate_at(rate_index) <= at_most and meets(rate_index + 1, 1):
            rate_index += 1
        return MaxRate(rate_at(rate_index), num_simulations=rate_index + 2 - start)
    nearest = max(start - _SINGLE_STEPS, lowest)
    while rate_index > nearest:
        rate_index -= 1
        if meets(rate_index, -1):
            return MaxRate(rate_at(rate_index), num_simulations=start + 1 - rate_index)
    if nearest == lowest:
        return MaxRate(0.0, num_simulations=start + 1 - lowest)
    evaluate_rate = partial(evaluate_at, problem, deployment, separate_nodes)
    known = {rate_at(index): evaluated[index] for index in range(nearest, start + 1)}
    found = _find_near(evaluate_rate, rate_at(nearest - 1), spread, known)
    return MaxRate(found.rate, num_simulations=len(known) + found.num_simulations)


def find_rate_near(
    problem: Problem,
    deployment: CandidateDeployment,
    guess: float,
    mapper: Mapper | None = None,
    *,
    separate_nodes: bool = False,
    known: Mapping[float, Evaluation] | None = None,
) -> MaxRate:
    """A rate of the series that meets the targets while the next one does not, near `guess`: steps of doubling length
    until two rates enclose it, then bisection. Assumes that more load never helps, and takes few simulations for a
    guess that is far off. With several workers a rate that may be next is simulated beside each; the result is the
    same. As `find_max_rate`, it does not go up from a run without a steady state. Rate 0 if none meets
    down to a thousandth of `guess`. `known` rates are not simulated again."""
    return _find_near(partial(evaluate_at, problem, deployment, separate_nodes), guess, mapper or SerialMapper(), known)


def evaluate_plan_at(problem: Problem, deployment: Deployment, rate: float, *, stop_early: bool = True) -> Evaluation:
    """The evaluation of `simulate_at`, of a plan's deployment, which need not be one of a search."""
    return _simulate_at(problem, deployment, rate, stop_early)[1]


def find_rate_of_plan(problem: Problem, deployment: Deployment, guess: float) -> MaxRate:
    """As `find_rate_near`, of a plan's deployment, on the same requests at the same rates."""
    return _find_near(partial(evaluate_plan_at, problem, deployment), guess, SerialMapper(), None)


def _find_near(
    evaluate_rate: Callable[[float], Evaluation], guess: float, spread: Mapper, known: Mapping[float, Evaluation] | None
) -> MaxRate:
    evaluated = {_rate_index(rate): evaluation for rate, evaluation in (known or {}).items() if _is_of_series(rate)}
    num_known = len(evaluated)

    def meets(rate_index: int, other: int) -> bool:
        if rate_index not in evaluated:
            is_new = spread.workers > 1 and other not in evaluated
            both = dict.fromkeys([rate_index, other] if is_new else [rate_index])
            evaluations = spread(evaluate_rate, [rate_at(index) for index in both])
            evaluated.update(zip(both, evaluations, strict=True))
        return evaluated[rate_index].meets

    def found(rate_index: int) -> MaxRate:
        rate = rate_at(rate_index) if rate_index > lowest else 0.0
        return MaxRate(rate, len(evaluated) - num_known, {rate_at(index): each for index, each in evaluated.items()})

    start, step = rate_index_below(guess), 1
    lowest = rate_index_below(guess / 1000)
    if meets(start, start + 1):
        low, high = start, start + 1
        while evaluated[low].long_enough and meets(high, high + 2 * step):
            step *= 2
            low, high = high, high + step
        if not evaluated[low].long_enough:
            return found(low)
    else:
        low, high = start - 1, start
        while low > lowest and not meets(low, low - 2 * step):
            step *= 2
            low, high = low - step, low
        if low <= lowest:
            return found(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(middle, (low + middle) // 2) else (low, middle)
    return found(low)


def _deployment(problem: Problem, deployment: CandidateDeployment, *, separate_nodes: bool = False) -> Deployment:
    plan = plan_of(problem, deployment, separate_nodes=separate_nodes)
    served = deployment_of(plan, problem.source, problem.cluster, problem.model)
    if problem.as_served:
        return served
    router = replace(served.router, routing=RoutingSettings(), request_timeout_s=math.inf)
    return replace(served, router=router)

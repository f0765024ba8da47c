"""The chosen deployment in detail: goodput with an interval, attainment against rate, latencies and bounds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tandem.core.slo import SloClass
from tandem.placement.evaluation.attainment import Evaluation
from tandem.placement.evaluation.phase_bound import phase_bound
from tandem.placement.evidence import AttainmentPoint, ClassAttainment, LatencySample, PhaseBound
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.mapper import Mapper
from tandem.placement.search.problem import Problem
from tandem.placement.search.trial import evaluate_at, rate_at, rate_index_below, simulate_at
from tandem.placement.simulator.result import SimulationResult

# Of the rates to simulate: steps of the series of rates from the goodput on.
_STEPS = (-49, -21, -9, -4, -1, 0, 1, 4, 7, 16)
_STEPS_OF_TRACE = (-9, 0, 1, 4, 11)  # of a trace all windows are simulated
_MAX_EXTENSIONS = 6
_SAMPLE = 2000


@dataclass(frozen=True, slots=True)
class EvaluatedRate:
    """A rate in requests per second, and the evaluation of a simulation at that rate."""

    rate: float
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class MeasuredGoodput:
    """Rates and goodput of `deployment` as simulated. `evaluated_rates` ascend."""

    deployment: CandidateDeployment
    goodput: float
    goodput_ci: tuple[float, float]
    evaluated_rates: tuple[EvaluatedRate, ...]


@dataclass(frozen=True, slots=True)
class Observation:
    """One complete run, reduced to the evidence of a plan."""

    evaluation: Evaluation
    latencies: tuple[LatencySample, ...]
    bounds: tuple[PhaseBound, ...]
    requests: int
    cached_share: float


def measure_goodput(
    problem: Problem,
    deployment: CandidateDeployment,
    goodput: float,
    mapper: Mapper,
    *,
    separate_nodes: bool,
    known: Mapping[float, Evaluation] | None = None,
) -> MeasuredGoodput:
    """Simulates rates around `goodput`, a result of `find_rate_near`, and further rates until the attainment is
    certainly kept at the lowest and certainly missed at the highest; a few rates at most. `known` rates are not
    simulated again."""
    assert goodput > 0
    evaluated = dict(known or {})

    def evaluate_rates(rates: Sequence[float]) -> None:
        evaluations = mapper(partial(evaluate_at, problem, deployment, separate_nodes), rates)
        evaluated.update(zip(rates, evaluations, strict=True))

    evaluate_rates([rate for rate in _rates_around(problem, goodput) if rate not in evaluated])
    for _ in range(_MAX_EXTENSIONS):
        lowest, highest = min(evaluated), max(evaluated)
        beyond = [lowest / 2] if _surplus(evaluated[lowest], 0) < 0 else []
        if _surplus(evaluated[highest], 1) >= 0:
            beyond.append(highest * 1.5)
        if not beyond:
            break
        evaluate_rates(beyond)
    points = tuple(EvaluatedRate(rate, evaluated[rate]) for rate in sorted(evaluated))
    return MeasuredGoodput(deployment, goodput, _rate_interval(points, goodput), points)


def measure_and_observe(
    problem: Problem,
    deployment: CandidateDeployment,
    goodput: float,
    rate: float,
    mapper: Mapper,
    *,
    separate_nodes: bool,
    known: Mapping[float, Evaluation],
) -> tuple[MeasuredGoodput, Observation]:
    """`measure_goodput`, and beside its simulations one complete run at `rate`."""
    missing = [each for each in _rates_around(problem, goodput) if each not in known]
    runs: list[Callable[[], Observation | Evaluation]] = [partial(observe, problem, deployment, separate_nodes, rate)]
    runs += [partial(evaluate_at, problem, deployment, separate_nodes, each) for each in missing]
    observation, *evaluations = mapper(_call, runs)
    assert isinstance(observation, Observation)
    found = {each: one for each, one in zip(missing, evaluations, strict=True) if isinstance(one, Evaluation)}
    measured = measure_goodput(
        problem, deployment, goodput, mapper, separate_nodes=separate_nodes, known={**known, **found}
    )
    return measured, observation


def _call(run: Callable[[], Observation | Evaluation]) -> Observation | Evaluation:
    return run()


def _rates_around(problem: Problem, goodput: float) -> list[float]:
    steps = _STEPS_OF_TRACE if problem.windows else _STEPS
    return [rate_at(rate_index_below(goodput) + step) for step in steps]


def observe(problem: Problem, deployment: CandidateDeployment, separate_nodes: bool, rate: float) -> Observation:
    """One complete run at `rate`."""
    result, evaluation = simulate_at(problem, deployment, rate, separate_nodes=separate_nodes, stop_early=False)
    steady = slice(evaluation.warm_up, len(result.requests) - evaluation.tail)
    return Observation(
        evaluation=evaluation,
        latencies=tuple(_latencies(result, steady, slo, index) for index, slo in enumerate(problem.classes)),
        bounds=_bounds(deployment, result),
        requests=len(result.requests),
        cached_share=result.cached_share,
    )


def class_attainments(measured: MeasuredGoodput, classes: Sequence[SloClass]) -> tuple[ClassAttainment, ...]:
    """The attainment of each class at the simulated rates."""
    attainments = []
    for index, slo in enumerate(classes):
        results = [(point.rate, point.evaluation.classes[index]) for point in measured.evaluated_rates]
        points = tuple(
            AttainmentPoint(
                rate, result.attainment, result.attainment_ci, result.ttft_attainment, result.tpot_attainment
            )
            for rate, result in results
        )
        knee = max((rate for rate, result in results if rate <= measured.goodput and result.margin >= 0), default=None)
        attainments.append(ClassAttainment(slo, points, knee))
    return tuple(attainments)


def _rate_interval(evaluated: Sequence[EvaluatedRate], goodput: float) -> tuple[float, float]:
    """The rates between which the 95 % interval of the attainment contains the required attainment; 0 or infinity if
    no simulated rate certainly meets or misses it."""
    met = [point.rate for point in evaluated if point.rate <= goodput and _surplus(point.evaluation, 0) >= 0]
    missed = [point.rate for point in evaluated if point.rate > goodput and _surplus(point.evaluation, 1) < 0]
    return max(met, default=0.0), min(missed, default=float("inf"))


def _surplus(evaluation: Evaluation, end: int) -> float:
    """The smallest difference between an end of the attainment's interval and the required attainment."""
    if not evaluation.stable:
        return -1.0
    return min(result.attainment_ci[end] - result.slo.attainment for result in evaluation.classes)


def _latencies(result: SimulationResult, steady: slice, slo: SloClass, index: int) -> LatencySample:
    of_class = result.requests.slo_class[steady] == index

    def sample(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, ...]:
        selected = values[steady][of_class]
        return tuple(selected[~np.isnan(selected)][:_SAMPLE].tolist())

    return LatencySample(slo, sample(result.ttft_s), sample(result.tpot_s))


def _bounds(deployment: CandidateDeployment, result: SimulationResult) -> tuple[PhaseBound, ...]:
    """The bounds of each group. Instances of a role are in the order of the groups."""
    bounds, first = [], {"prefill": 0, "decode": 0, "colocated": 0}
    for group in deployment.groups:
        role = group.kind.role
        begin, first[role] = first[role], first[role] + group.instances
        uses = [use for use in result.instances if use.role == role][begin : begin + group.instances]
        label = f"{role}, {group.instances} x {group.kind.device} {group.kind.shape}"
        tokens = sum(use.prefill_tokens if role == "prefill" else use.decode_tokens for use in uses)
        bounds.append(phase_bound(role, label, uses, tokens, result.end_s))
    return tuple(bounds)

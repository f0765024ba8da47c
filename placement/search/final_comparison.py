"""The chosen deployment against its best alternatives, on the same requests.

The search simulates short runs of small deployments, and stops when its bounds say so. Its best deployment and the
runners-up are simulated here once more, all at one size and on common random numbers (Law, Simulation Modeling and
Analysis, section 11.2): the same requests in the same order at the same rate, so a difference is one between the
deployments. The differences of their attainments have an interval from batch means. While an interval contains 0, the
runs get twice as long, up to a limit; what is not told apart then is said to be equal. This is a sequential selection
of the best (Nelson, Swann, Goldsman and Song, 2001, simplified: the interval of each pair has 95 %).

The result has the highest simulated goodput of all that were compared, and the report lists nothing else: every
alternative missed its targets in a simulation at the next rate above the goodput of the chosen deployment.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from tandem.placement.evaluation.attainment import targets_met
from tandem.placement.evaluation.steady_state import Interval, difference_interval
from tandem.placement.search.best_first import EvaluatedDeployment, ReportProgress
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.mapper import Mapper
from tandem.placement.search.problem import Problem
from tandem.placement.search.space import SearchSpace
from tandem.placement.search.trial import MaxRate, find_max_rate, scaled_down, simulate_at

MAX_INSTANCES = 16  # of a deployment that is simulated without scaling
_NUM_FINALISTS = 12
_NUM_WITH_GOODPUT = 4  # alternatives whose goodput is simulated, beside the best of each layout
_CLOSE = 0.9  # ratio to the highest goodput from which a difference is measured
_MIN_RATE = 1e-9
_MAX_FACTOR = 4  # of the requests per simulation


@dataclass(frozen=True, slots=True)
class Represented:
    """A deployment, and what is simulated for it. `scale`: goodput of the deployment divided by that of the other."""

    candidate: EvaluatedDeployment
    simulated: CandidateDeployment
    scale: float

    @property
    def is_scaled(self) -> bool:
        return self.simulated != self.candidate.deployment


@dataclass(frozen=True, slots=True)
class Alternative:
    """`candidate.goodput` is 0 if it is only known to be below that of the chosen one. `difference`: 95 % interval of
    the chosen deployment's attainment minus the alternative's, at the rate of the former; None if it was not
    measured."""

    candidate: EvaluatedDeployment
    difference: Interval | None = None

    @property
    def is_equal(self) -> bool:
        return self.difference is not None and self.difference[0] <= 0 <= self.difference[1]


@dataclass(frozen=True, slots=True)
class FinalComparison:
    """`problem` has the requests per simulation that the comparison needed. `rate` is the goodput of what is simulated
    for the chosen deployment."""

    problem: Problem
    chosen: Represented
    rate: float
    alternatives: tuple[Alternative, ...]
    num_simulations: int

    @property
    def goodput(self) -> float:
        return self.rate * self.chosen.scale


def compare_finalists(
    space: SearchSpace,
    evaluated: Sequence[EvaluatedDeployment],
    chosen: EvaluatedDeployment,
    mapper: Mapper,
    report: ReportProgress,
) -> FinalComparison:
    """`evaluated` and `chosen` are the result of a search. For the cheapest deployment that serves a rate, the cheaper
    finalists are simulated at the rate; the cheapest that meets the targets is the chosen one."""
    comparison = _Comparison(space, mapper, report)
    finalists = _finalists(evaluated, chosen)
    if space.problem.cheapest and space.problem.rate is not None and (chosen.goodput or 0.0) >= space.problem.rate:
        return comparison.of_prices(finalists, chosen, space.problem.rate)
    return comparison.of_goodputs(finalists, chosen)


@dataclass(frozen=True, slots=True)
class _Round:
    """`rates` are of what is simulated for a deployment; None if it is only known to be too low."""

    leader: Represented
    rates: dict[CandidateDeployment, float | None]
    differences: dict[CandidateDeployment, Interval]

    @property
    def undecided(self) -> list[CandidateDeployment]:
        return [deployment for deployment, (low, high) in self.differences.items() if low <= 0 <= high]


class _Comparison:
    def __init__(self, space: SearchSpace, mapper: Mapper, report: ReportProgress) -> None:
        self._space = space
        self._mapper = mapper
        self._report = report
        self._num_simulations = 0

    def of_goodputs(self, finalists: Sequence[EvaluatedDeployment], chosen: EvaluatedDeployment) -> FinalComparison:
        problem = self._space.problem
        count, limit = problem.section.requests, min(_MAX_FACTOR * problem.section.requests, len(problem.requests))
        all_of_them = [self._represented(candidate) for candidate in (chosen, *finalists)]
        self._report(0.0, f"comparing the best {len(all_of_them)} deployments")
        decision = self._compare(problem, all_of_them[0], all_of_them[1:])
        while decision.undecided and 2 * count <= limit:
            count *= 2
            problem = replace(problem, section=problem.section.model_copy(update={"requests": count}))
            self._report(1 - problem.section.requests / count / 2, f"telling the best apart with {count:,} requests")
            undecided = [one for one in all_of_them if one.candidate.deployment in decision.undecided]
            decision = self._compare(problem, decision.leader, undecided)
        if problem is not self._space.problem:
            leader = decision.leader
            decision = self._compare(problem, leader, [one for one in all_of_them if one is not leader])
        return self._result(problem, decision, all_of_them)

    def of_prices(
        self, finalists: Sequence[EvaluatedDeployment], chosen: EvaluatedDeployment, rate: float
    ) -> FinalComparison:
        problem = self._space.problem
        all_of_them = [self._represented(candidate) for candidate in (chosen, *finalists)]
        self._report(0.0, "checking the cheaper deployments")
        price = self._price(all_of_them[0])
        cheaper = [one for one in all_of_them[1:] if self._price(one) < price]
        runs = [_Run(one.simulated, rate / one.scale, one.is_scaled) for one in cheaper]
        meeting = [
            one for one, meets in zip(cheaper, self._mapper(partial(_meets, problem), runs), strict=True) if meets
        ]
        self._num_simulations += len(runs)
        leader = min((all_of_them[0], *meeting), key=self._price)
        rates: dict[CandidateDeployment, float | None] = {
            one.candidate.deployment: (one.candidate.goodput or 0.0) / one.scale for one in all_of_them
        }
        rates |= {one.candidate.deployment: None for one in cheaper}
        rates[leader.candidate.deployment] = self._max_rate(problem, leader, rate / leader.scale)
        return self._result(problem, _Round(leader, rates, {}), all_of_them)

    def _price(self, one: Represented) -> float:
        return self._space.problem.price_per_hour(one.candidate.deployment.devices)

    def _result(self, problem: Problem, decision: _Round, all_of_them: Sequence[Represented]) -> FinalComparison:
        alternatives = []
        for one in all_of_them:
            deployment = one.candidate.deployment
            if deployment != decision.leader.candidate.deployment:
                goodput = (decision.rates.get(deployment) or 0.0) * one.scale
                alternatives.append(
                    Alternative(replace(one.candidate, goodput=goodput), decision.differences.get(deployment))
                )
        leader = decision.leader
        rate = decision.rates[leader.candidate.deployment] or 0.0
        return FinalComparison(
            problem,
            replace(leader, candidate=replace(leader.candidate, goodput=rate * leader.scale)),
            rate,
            tuple(alternatives),
            self._num_simulations,
        )

    def _compare(self, problem: Problem, leader: Represented, others: Sequence[Represented]) -> _Round:
        """One round: the deployment with the highest goodput leads; of equal ones that with the fewest devices."""
        guess = (leader.candidate.goodput or leader.candidate.predicted) / leader.scale
        rates: dict[CandidateDeployment, float | None] = {
            leader.candidate.deployment: self._max_rate(problem, leader, guess)
        }
        best = self._goodput(leader, rates)
        trials = [_Trial(one, best / one.scale, at_least=True) for one in others]
        rates |= self._max_rates(problem, trials if best > 0 else [replace(trial, at_least=False) for trial in trials])
        leader = min(
            (leader, *others), key=lambda one: (-self._goodput(one, rates), one.candidate.deployment.num_devices)
        )
        best = self._goodput(leader, rates)
        lower = [one for one in others if rates[one.candidate.deployment] is None]
        rates |= self._max_rates(
            problem,
            [
                _Trial(one, min(best, one.candidate.predicted) / one.scale, at_least=False)
                for one in _most_promising(lower)
            ],
        )
        leader_deployment = leader.candidate.deployment
        close = [
            one
            for one in others
            if one.candidate.deployment != leader_deployment and self._goodput(one, rates) >= _CLOSE * best > 0
        ]
        if not close:
            return _Round(leader, rates, {})
        runs = [_Run(one.simulated, best / one.scale, one.is_scaled) for one in (leader, *close)]
        differences = self._mapper(partial(_difference, problem, runs[0]), runs[1:])
        self._num_simulations += 2 * len(close)
        return _Round(leader, rates, {one.candidate.deployment: d for one, d in zip(close, differences, strict=True)})

    def _max_rate(self, problem: Problem, one: Represented, guess: float) -> float:
        """Above 0: a deployment of the search serves something."""
        rate = 0.0
        while rate == 0.0:
            rate = self._count(
                find_max_rate(problem, one.simulated, guess, 0.0, self._mapper, separate_nodes=one.is_scaled)
            )
            guess /= 4
            assert guess > _MIN_RATE, "a deployment that met its targets in the search meets them at no rate"
        return rate

    def _max_rates(self, problem: Problem, trials: "Sequence[_Trial]") -> dict[CandidateDeployment, float | None]:
        max_rates = self._mapper(partial(_run_trial, problem), trials)
        return {
            trial.of.candidate.deployment: self._count(max_rate) or None
            for trial, max_rate in zip(trials, max_rates, strict=True)
        }

    def _count(self, max_rate: MaxRate) -> float:
        self._num_simulations += max_rate.num_simulations
        return max_rate.rate

    @staticmethod
    def _goodput(one: Represented, rates: dict[CandidateDeployment, float | None]) -> float:
        return (rates.get(one.candidate.deployment) or 0.0) * one.scale

    def _represented(self, candidate: EvaluatedDeployment) -> Represented:
        deployment = candidate.deployment
        if deployment.num_instances <= MAX_INSTANCES:
            return Represented(candidate, deployment, 1.0)
        simulated = scaled_down(deployment)
        predicted = self._space.predictor.goodput(simulated)
        return Represented(candidate, simulated, candidate.predicted / predicted if predicted > 0 else 1.0)


@dataclass(frozen=True, slots=True)
class _Trial:
    """`at_least`: only rates above `rate` count; otherwise rates from `rate` downwards."""

    of: Represented
    rate: float
    at_least: bool


def _run_trial(problem: Problem, trial: _Trial) -> MaxRate:
    at_least = trial.rate if trial.at_least else 0.0
    return find_max_rate(problem, trial.of.simulated, trial.rate, at_least, separate_nodes=trial.of.is_scaled)


@dataclass(frozen=True, slots=True)
class _Run:
    deployment: CandidateDeployment
    rate: float
    separate_nodes: bool


def _meets(problem: Problem, run: _Run) -> bool:
    return simulate_at(problem, run.deployment, run.rate, separate_nodes=run.separate_nodes)[1].meets


def _difference(problem: Problem, first: _Run, second: _Run) -> Interval:
    """Of the attainments of two runs, of the class with the smallest margin in the first."""
    (result, evaluation), (other_result, other_evaluation) = (
        simulate_at(problem, run.deployment, run.rate, separate_nodes=run.separate_nodes, stop_early=False)
        for run in (first, second)
    )
    count = min(len(result.requests), len(other_result.requests))
    steady = slice(
        max(evaluation.warm_up, other_evaluation.warm_up), count - max(evaluation.tail, other_evaluation.tail)
    )
    margins = [of_class.margin for of_class in evaluation.classes]
    of_class = result.requests.slo_class[steady] == margins.index(min(margins))
    met, other_met = (targets_met(one, problem.classes)[steady][of_class] for one in (result, other_result))
    return difference_interval(met, other_met)


def _finalists(evaluated: Sequence[EvaluatedDeployment], chosen: EvaluatedDeployment) -> list[EvaluatedDeployment]:
    """The best deployment of each combination of kinds beside the chosen one; of all these the best."""
    best: dict[tuple[InstanceKind, ...], EvaluatedDeployment] = {}
    for candidate in evaluated:
        kinds = tuple(group.kind for group in candidate.deployment.groups)
        if candidate.deployment != chosen.deployment and (kinds not in best or _rank(candidate) > _rank(best[kinds])):
            best[kinds] = candidate
    promising = [candidate for candidate in best.values() if candidate.predicted > 0]
    ranked = sorted(promising, key=_rank, reverse=True)
    first_of_layout = {candidate.deployment.layout: candidate for candidate in reversed(ranked)}
    rest = [candidate for candidate in ranked if candidate not in first_of_layout.values()]
    return [*first_of_layout.values(), *rest][:_NUM_FINALISTS]


def _most_promising(others: Sequence[Represented]) -> list[Represented]:
    """The best of each layout, then the best of the rest."""
    ranked = sorted(others, key=lambda one: _rank(one.candidate), reverse=True)
    first_of_layout = {one.candidate.deployment.layout: one for one in reversed(ranked)}
    rest = [one for one in ranked if one not in first_of_layout.values()]
    return [*first_of_layout.values(), *rest[:_NUM_WITH_GOODPUT]]


def _rank(candidate: EvaluatedDeployment) -> tuple[float, float]:
    return (candidate.goodput or 0.0, candidate.predicted)

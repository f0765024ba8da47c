"""The chosen deployment against its best alternatives, on the same requests.

The search simulates short runs of small deployments, and stops when its bounds say so. Its best deployment and the
runners-up are simulated here once more, all at one size and on common random numbers (Law, Simulation Modeling and
Analysis, section 11.2): the same requests in the same order at the same rate, so a difference is one between the
deployments. The differences of their attainments have an interval from batch means. While an interval contains 0, the
runs get twice as long, up to a limit; what is not told apart then is said to be equal. This is a sequential selection
of the best (Nelson, Swann, Goldsman and Song, 2001, simplified: the interval of each pair has 95 %).

The result has the highest simulated goodput of all that were compared, and the report lists nothing else: no
alternative met its targets at a higher rate than the chosen deployment in runs of the same requests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from tandem.core.errors import ConfigError
from tandem.placement.evaluation.attainment import deciding_window, targets_met
from tandem.placement.evaluation.steady_state import Interval, difference_interval
from tandem.placement.search.best_first import EvaluatedDeployment, ReportProgress
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.mapper import Mapper
from tandem.placement.search.problem import Problem
from tandem.placement.search.slack_variants import slack_variants
from tandem.placement.search.space import SearchSpace
from tandem.placement.search.trial import (
    RATE_RATIO,
    MaxRate,
    evaluate_at,
    find_max_rate,
    find_rate_near,
    scaled_down,
    simulate_at,
)

MAX_INSTANCES = 16  # of a deployment that is simulated without scaling
_NUM_FINALISTS = 8
_NUM_OF_TRACE = 4  # of a trace all windows are simulated
_NUM_WITH_SLACK = 2  # variants, beside the finalists
_NUM_WITH_GOODPUT = 2  # alternatives whose goodput is simulated, beside the best of each layout
_WARM_UP_SHARE = 0.25
_MAX_FACTOR = 4  # of the requests per simulation


@dataclass(frozen=True, slots=True)
class Represented:
    """A deployment, and what is simulated for it. `scale`: goodput of the deployment divided by that of the other."""

    candidate: EvaluatedDeployment
    simulated: CandidateDeployment
    scale: float

    @property
    def deployment(self) -> CandidateDeployment:
        return self.candidate.deployment

    @property
    def num_devices(self) -> int:
        return self.deployment.num_devices

    @property
    def is_scaled(self) -> bool:
        return self.simulated != self.deployment


@dataclass(frozen=True, slots=True)
class Alternative:
    """`candidate.goodput` is 0 if it is only known to be below that of the chosen one. `difference`: 95 % interval of
    the chosen deployment's attainment minus the alternative's, at the rate of the former; None if a shorter run told
    them apart."""

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
    finalists = _finalists(evaluated, chosen, _NUM_OF_TRACE if space.problem.windows else _NUM_FINALISTS)
    finalists += slack_variants(space.problem, (chosen, *finalists), _NUM_WITH_SLACK)
    if space.problem.cheapest and space.problem.rate is not None and (chosen.goodput or 0.0) >= space.problem.rate:
        return comparison.of_prices(finalists, chosen, space.problem.rate)
    return comparison.of_goodputs(finalists, chosen)


@dataclass(frozen=True, slots=True)
class _Round:
    """`rates` are of what is simulated for a deployment. `differences` are those to the leader, at its rate."""

    leader: Represented
    rates: dict[CandidateDeployment, float]
    differences: dict[CandidateDeployment, Interval]

    @property
    def goodput(self) -> float:
        return self.rates[self.leader.deployment] * self.leader.scale

    def is_open(self, deployment: CandidateDeployment) -> bool:
        low, high = self.differences.get(deployment, (1.0, 1.0))
        return low <= 0 <= high


class _Comparison:
    def __init__(self, space: SearchSpace, mapper: Mapper, report: ReportProgress) -> None:
        self._space = space
        self._mapper = mapper
        self._report = report
        self._num_simulations = 0

    def of_goodputs(self, finalists: Sequence[EvaluatedDeployment], chosen: EvaluatedDeployment) -> FinalComparison:
        problem = self._space.problem
        count = problem.section.requests
        limit = count if problem.windows else min(_MAX_FACTOR * count, len(problem.requests))
        everyone = [self._represented(candidate) for candidate in (chosen, *finalists)]
        self._report(0.0, f"comparing the best {len(everyone)} deployments")
        decision = self._compare(problem, everyone[0], everyone[1:])
        while 2 * count <= limit and (undecided := [one for one in everyone if decision.is_open(one.deployment)]):
            count *= 2
            problem = replace(problem, section=problem.section.model_copy(update={"requests": count}))
            self._report(0.1 + 0.6 * count / limit, f"{count:,} requests to tell the best apart")
            decision = self._compare(problem, decision.leader, undecided)
            decision = self._with_better_ones(problem, decision, [one for one in everyone if one not in undecided])
        self._report(0.8, "simulating the goodput of alternatives")
        below = [one for one in everyone if one.deployment not in decision.rates]
        rates = self._goodputs_below(decision, _most_promising(below))
        return self._result(problem, replace(decision, rates=decision.rates | rates), everyone)

    def of_prices(
        self, finalists: Sequence[EvaluatedDeployment], chosen: EvaluatedDeployment, rate: float
    ) -> FinalComparison:
        problem = self._space.problem
        everyone = [self._represented(candidate) for candidate in (chosen, *finalists)]
        self._report(0.0, "checking the cheaper deployments")
        price = self._price(everyone[0])
        cheaper = [one for one in everyone[1:] if self._price(one) < price]
        meets = self._mapper(partial(_meets, problem), [_Trial(one, rate / one.scale) for one in cheaper])
        meeting = [one for one, is_met in zip(cheaper, meets, strict=True) if is_met]
        self._num_simulations += len(cheaper)
        leader = min((everyone[0], *meeting), key=self._price)
        rates = {one.deployment: (one.candidate.goodput or 0.0) / one.scale for one in everyone if one not in cheaper}
        rates[leader.deployment] = self._max_rate(problem, leader, rate / leader.scale)
        return self._result(problem, _Round(leader, rates, {}), everyone)

    def _price(self, one: Represented) -> float:
        return self._space.problem.price_per_hour(one.candidate.deployment.devices)

    def _result(self, problem: Problem, decision: _Round, everyone: Sequence[Represented]) -> FinalComparison:
        leader = decision.leader
        alternatives = tuple(
            Alternative(
                replace(one.candidate, goodput=decision.rates.get(one.deployment, 0.0) * one.scale),
                decision.differences.get(one.deployment),
            )
            for one in everyone
            if one.deployment != leader.deployment
        )
        chosen = replace(leader, candidate=replace(leader.candidate, goodput=decision.goodput))
        return FinalComparison(problem, chosen, decision.rates[leader.deployment], alternatives, self._num_simulations)

    def _compare(self, problem: Problem, leader: Represented, others: Sequence[Represented]) -> _Round:
        """Every other deployment runs once at the rate of the leader. If it meets the targets there, its own goodput is
        found. The highest goodput leads; of equal ones that of the fewest devices."""
        guess = (leader.candidate.goodput or leader.candidate.predicted) / leader.scale
        rates = {leader.deployment: self._max_rate(problem, leader, guess)}
        first = leader
        while True:
            goodput = rates[leader.deployment] * leader.scale
            rivals = [one for one in (first, *others) if one.deployment != leader.deployment]
            met = _run(problem, leader, goodput).met
            runs = self._mapper(partial(_run, problem, goodput=goodput), rivals)
            self._num_simulations += 1 + len(rivals)
            new = [one for one, run in zip(rivals, runs, strict=True) if run.meets and one.deployment not in rates]
            rates |= self._max_rates(problem, [(one, goodput / one.scale) for one in new])
            best = min(
                (leader, *rivals), key=lambda one: (-rates.get(one.deployment, 0.0) * one.scale, one.num_devices)
            )
            if best is leader:
                differences = (difference_interval(*_of_equal_length(met, run.met)) for run in runs)
                by_deployment = zip((one.deployment for one in rivals), differences, strict=True)
                return _Round(leader, rates, dict(by_deployment))
            leader = best

    def _with_better_ones(self, problem: Problem, decision: _Round, others: Sequence[Represented]) -> _Round:
        """Those that an earlier round told apart are tried again: longer runs can lower the goodput of the leader."""
        rivals = [one for one in others if one.deployment not in decision.rates]
        trials = [_Trial(one, decision.goodput / one.scale) for one in rivals]
        max_rates = self._mapper(partial(_higher_rate, problem), trials)
        better = {
            one.deployment: self._count(found) for one, found in zip(rivals, max_rates, strict=True) if found.rate
        }
        self._num_simulations += len(rivals)
        if not better:
            return decision
        rates = decision.rates | better
        known = [one for one in (decision.leader, *others) if one.deployment in rates]
        leader = min(known, key=lambda one: (-rates[one.deployment] * one.scale, one.num_devices))
        return _Round(leader, rates, {})

    def _goodputs_below(self, decision: _Round, others: Sequence[Represented]) -> dict[CandidateDeployment, float]:
        """For the report, in runs of the configured length, and below the leader, as was found in runs at its rate."""
        below = decision.goodput / RATE_RATIO
        found = self._max_rates(
            self._space.problem, [(one, min(below, one.candidate.predicted) / one.scale) for one in others]
        )
        scales = {one.deployment: one.scale for one in others}
        return {deployment: min(rate, below / scales[deployment]) for deployment, rate in found.items()}

    def _max_rate(self, problem: Problem, one: Represented, guess: float) -> float:
        """Above 0. Raises ConfigError if a window of a trace, or a longer run than the search had, misses the targets
        at every rate."""
        found = find_rate_near(problem, one.simulated, guess, self._mapper, separate_nodes=one.is_scaled)
        self._num_simulations += found.num_simulations
        if found.rate > 0:
            return found.rate
        if not problem.windows:
            raise ConfigError(
                f"{one.deployment} meets the targets in short simulations only; loosen the targets of slo, or raise "
                "search.requests"
            )
        evaluation = evaluate_at(problem, one.simulated, one.is_scaled, guess / 1000)
        window = deciding_window(problem.windows, evaluation)
        met_share = sum(
            window.time_share for window, of in zip(problem.windows, evaluation.windows, strict=True) if of.meets
        )
        cover = math.floor(100 * met_share) / 100
        raise ConfigError(
            f"the trace from second {window.begin_s:.0f} to {window.end_s:.0f}: {one.deployment} misses the targets "
            f"there at every rate; loosen the targets of slo, or set workload.cover to {cover:g} or less"
        )

    def _max_rates(
        self, problem: Problem, guesses: Sequence[tuple[Represented, float]]
    ) -> dict[CandidateDeployment, float]:
        trials = [_Trial(one, guess) for one, guess in guesses]
        max_rates = self._mapper(partial(_rate_from, problem), trials)
        return {one.deployment: self._count(found) for (one, _), found in zip(guesses, max_rates, strict=True)}

    def _count(self, max_rate: MaxRate) -> float:
        self._num_simulations += max_rate.num_simulations
        return max_rate.rate

    def _represented(self, candidate: EvaluatedDeployment) -> Represented:
        deployment = candidate.deployment
        if deployment.num_instances <= MAX_INSTANCES:
            return Represented(candidate, deployment, 1.0)
        simulated = scaled_down(deployment)
        predicted = self._space.predictor.goodput(simulated)
        return Represented(candidate, simulated, candidate.predicted / predicted if predicted > 0 else 1.0)


@dataclass(frozen=True, slots=True)
class _Trial:
    of: Represented
    rate: float


def _rate_from(problem: Problem, trial: _Trial) -> MaxRate:
    return find_rate_near(problem, trial.of.simulated, trial.rate, separate_nodes=trial.of.is_scaled)


def _meets(problem: Problem, trial: _Trial) -> bool:
    _, evaluation = simulate_at(problem, trial.of.simulated, trial.rate, separate_nodes=trial.of.is_scaled)
    return evaluation.meets


def _higher_rate(problem: Problem, trial: _Trial) -> MaxRate:
    """Rate 0 if the deployment misses its targets at the next rate above."""
    return find_max_rate(problem, trial.of.simulated, trial.rate, trial.rate, separate_nodes=trial.of.is_scaled)


@dataclass(frozen=True, slots=True)
class _Run:
    """`met`: whether each request met its targets, without the first quarter of the run."""

    meets: bool
    met: npt.NDArray[np.bool_]


def _run(problem: Problem, one: Represented, goodput: float) -> _Run:
    """A complete run at the rate that corresponds to `goodput`."""
    result, evaluation = simulate_at(
        problem, one.simulated, goodput / one.scale, separate_nodes=one.is_scaled, stop_early=False
    )
    met = targets_met(result, problem.classes)
    return _Run(evaluation.meets, met[int(_WARM_UP_SHARE * len(met)) :])


def _of_equal_length(
    first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Runs of different lengths begin with the same requests."""
    count = min(len(first), len(second))
    return first[:count], second[:count]


def _finalists(
    evaluated: Sequence[EvaluatedDeployment], chosen: EvaluatedDeployment, count: int
) -> list[EvaluatedDeployment]:
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
    return [*first_of_layout.values(), *rest][:count]


def _most_promising(others: Sequence[Represented]) -> list[Represented]:
    """The best of each layout, then the best of the rest."""
    ranked = sorted(others, key=lambda one: _rank(one.candidate), reverse=True)
    first_of_layout = {one.candidate.deployment.layout: one for one in reversed(ranked)}
    rest = [one for one in ranked if one not in first_of_layout.values()]
    return [*first_of_layout.values(), *rest[:_NUM_WITH_GOODPUT]]


def _rank(candidate: EvaluatedDeployment) -> tuple[float, float]:
    return (candidate.goodput or 0.0, candidate.predicted)

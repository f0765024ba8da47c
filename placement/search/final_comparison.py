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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tandem.placement.evaluation.attainment import Evaluation
from tandem.placement.evaluation.steady_state import Interval
from tandem.placement.search.best_first import EvaluatedDeployment, ReportProgress
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.finalists import finalists_of, most_promising
from tandem.placement.search.mapper import Mapper
from tandem.placement.search.paired_runs import RateTrial, Represented
from tandem.placement.search.problem import Problem
from tandem.placement.search.rate_simulations import KnownEvaluations, RateSimulations
from tandem.placement.search.space import SearchSpace
from tandem.placement.search.trial import RATE_RATIO, scaled_down
from tandem.placement.search.variants import variants_of
from tandem.placement.workload.windows import Window

MAX_INSTANCES = 16  # of a deployment that is simulated without scaling
_NUM_FINALISTS = 8
_NUM_OF_TRACE = 4  # of a trace all windows are simulated
_NUM_WITH_GOODPUT = 2  # alternatives whose goodput is simulated, beside the best of each layout
_OF_ALTERNATIVES = 1000  # requests, at most, of a window for the goodput of alternatives
_PART = 0.2  # of the rest, for the progress
_MAX_FACTOR = 4  # of the requests per simulation


@dataclass(frozen=True, slots=True)
class ComparedAlternative:
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
    for the chosen deployment, `evaluated` has its evaluations at this and other rates. `deciding` is the window of a
    trace that missed its targets first at a higher rate; None if none is known."""

    problem: Problem
    chosen: Represented
    rate: float
    alternatives: tuple[ComparedAlternative, ...]
    num_simulations: int
    evaluated: Mapping[float, Evaluation]
    deciding: Window | None

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
    """See `Comparison.of_finalists`."""
    return Comparison(space, mapper, report).of_finalists(evaluated, chosen)


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


class Comparison:
    """Of deployments of one search. `known`: see `RateSimulations`."""

    def __init__(
        self, space: SearchSpace, mapper: Mapper, report: ReportProgress, known: KnownEvaluations | None = None
    ) -> None:
        self._space = space
        self._report = report
        self._share = 0.0
        self._simulations = RateSimulations(mapper, known)

    def on_whole_trace(self, chosen: EvaluatedDeployment) -> tuple[float, Window | None]:
        """The goodput in all windows of a trace, and the window that limits it; None if none is known. Raises
        ConfigError if a window misses the targets at every rate."""
        problem, one = self._space.problem, self._represented(chosen)
        rate = self._simulations.max_rate(problem, one, _guess(problem, one))
        return rate * one.scale, self._simulations.deciding_window(problem, one, rate)

    def of_finalists(self, evaluated: Sequence[EvaluatedDeployment], chosen: EvaluatedDeployment) -> FinalComparison:
        """`evaluated` and `chosen` are the result of the search. For the cheapest deployment that serves a rate, the
        cheaper finalists are simulated at the rate; the cheapest that meets the targets is the chosen one."""
        problem = self._space.problem
        finalists = finalists_of(evaluated, chosen, _NUM_OF_TRACE if problem.windows else _NUM_FINALISTS)
        finalists += variants_of(problem, (chosen, *finalists))
        if problem.cheapest and problem.rate is not None and (chosen.goodput or 0.0) >= problem.rate:
            return self._of_prices(finalists, chosen, problem.rate)
        return self._of_goodputs(finalists, chosen)

    def _of_goodputs(self, finalists: Sequence[EvaluatedDeployment], chosen: EvaluatedDeployment) -> FinalComparison:
        problem = self._space.problem
        count = problem.section.requests
        limit = count if problem.windows else min(_MAX_FACTOR * count, len(problem.requests))
        everyone = [self._represented(candidate) for candidate in (chosen, *finalists)]
        self._begin(f"comparing the best {len(everyone)} deployments")
        decision = self._compare(problem, everyone[0], everyone[1:])
        while 2 * count <= limit and (undecided := [one for one in everyone if decision.is_open(one.deployment)]):
            count *= 2
            problem = replace(problem, section=problem.section.model_copy(update={"requests": count}))
            self._begin(f"{count:,} requests to tell the best apart")
            decision = self._compare(problem, decision.leader, undecided)
            decision = self._with_better_ones(problem, decision, [one for one in everyone if one not in undecided])
        self._begin("simulating the goodput of alternatives")
        below = [one for one in everyone if one.deployment not in decision.rates]
        count = 0 if problem.windows else _NUM_WITH_GOODPUT
        rates = self._goodputs_below(problem, decision, most_promising(below, count))
        return self._result(problem, replace(decision, rates=decision.rates | rates), everyone)

    def _of_prices(
        self, finalists: Sequence[EvaluatedDeployment], chosen: EvaluatedDeployment, rate: float
    ) -> FinalComparison:
        problem = self._space.problem
        everyone = [self._represented(candidate) for candidate in (chosen, *finalists)]
        self._begin("checking the cheaper deployments")
        price = self._price(everyone[0])
        cheaper = [one for one in everyone[1:] if self._price(one) < price]
        tried = [everyone[0], *cheaper]
        meets = self._simulations.meet(problem, [RateTrial(one, rate / one.scale) for one in tried])
        meeting = [one for one, is_met in zip(tried, meets, strict=True) if is_met]
        if not meeting:  # none serves the rate after all: the best is what is asked for
            return self._of_goodputs(finalists, chosen)
        leader = min(meeting, key=self._price)
        rates = {one.deployment: (one.candidate.goodput or 0.0) / one.scale for one in everyone if one not in cheaper}
        # It lies between two rates of the series; where the upper one misses the targets, it is the highest known.
        above = self._simulations.max_rate(problem, leader, rate / leader.scale)
        rates[leader.deployment] = max(above, rate / leader.scale)
        return self._result(problem, _Round(leader, rates, {}), everyone)

    def _price(self, one: Represented) -> float:
        return self._space.problem.price_per_hour(one.candidate.deployment.devices)

    def _result(self, problem: Problem, decision: _Round, everyone: Sequence[Represented]) -> FinalComparison:
        leader = decision.leader
        alternatives = tuple(
            ComparedAlternative(
                replace(one.candidate, goodput=decision.rates.get(one.deployment, 0.0) * one.scale),
                decision.differences.get(one.deployment),
            )
            for one in everyone
            if one.deployment != leader.deployment
        )
        chosen = replace(leader, candidate=replace(leader.candidate, goodput=decision.goodput))
        rate = decision.rates[leader.deployment]
        return FinalComparison(
            problem,
            chosen,
            rate,
            alternatives,
            self._simulations.count,
            self._simulations.evaluations(problem, leader),
            self._simulations.deciding_window(problem, leader, rate),
        )

    def _compare(self, problem: Problem, leader: Represented, others: Sequence[Represented]) -> _Round:
        """Every other deployment runs once at the rate of the leader. If it meets the targets there, its own goodput is
        found from there on: at a lower rate, where an earlier search has ended, it may have missed them by chance. The
        highest goodput leads; of equal ones that of the fewest devices."""
        rates = {leader.deployment: self._simulations.max_rate(problem, leader, _guess(problem, leader))}
        first = leader
        while True:
            rivals = [one for one in (first, *others) if one.deployment != leader.deployment]
            rivals = self._without_worse(problem, leader, rivals, rates)
            if not rivals:
                return _Round(leader, rates, {})
            self._begin(f"running {len(rivals) + 1} deployments on the same requests")
            own, runs = self._simulations.paired(problem, leader, rates[leader.deployment], rivals)
            new = [
                RateTrial(one, run.rate, {run.rate: run.evaluation})
                for one, run in zip(rivals, runs, strict=True)
                if run.evaluation.meets and rates.get(one.deployment, 0.0) < run.rate
            ]
            found = self._simulations.max_rates(problem, new)
            rates |= {trial.of.deployment: found_rate for trial, found_rate in zip(new, found, strict=True)}
            best = min(
                (leader, *rivals), key=lambda one: (-rates.get(one.deployment, 0.0) * one.scale, one.num_devices)
            )
            if best is leader:
                differences = {one.deployment: own.difference(run) for one, run in zip(rivals, runs, strict=True)}
                return _Round(leader, rates, differences)
            leader = best

    def _without_worse(
        self,
        problem: Problem,
        leader: Represented,
        rivals: Sequence[Represented],
        rates: Mapping[CandidateDeployment, float],
    ) -> list[Represented]:
        """The rivals without those that a run of one window tells apart: of a trace, where every window must meet the
        targets, the window that limits the leader. There they miss the targets and are certainly worse."""
        rate = rates[leader.deployment]
        window = self._simulations.deciding_window(problem, leader, rate) if problem.cover == 1.0 else None
        if window is None:
            return list(rivals)
        self._begin(f"running {len(rivals) + 1} deployments on one window")
        own, runs = self._simulations.paired(problem, leader, rate, rivals, window)
        return [
            one
            for one, run in zip(rivals, runs, strict=True)
            if one.deployment in rates or run.evaluation.meets or own.difference(run)[0] <= 0
        ]

    def _with_better_ones(self, problem: Problem, decision: _Round, others: Sequence[Represented]) -> _Round:
        """Those that an earlier round told apart are tried again: longer runs can lower the goodput of the leader."""
        rivals = [one for one in others if one.deployment not in decision.rates]
        trials = [RateTrial(one, decision.goodput / one.scale) for one in rivals]
        found = self._simulations.higher_rates(problem, trials)
        better = {one.deployment: rate for one, rate in zip(rivals, found, strict=True) if rate > 0}
        if not better:
            return decision
        rates = decision.rates | better
        known = [one for one in (decision.leader, *others) if one.deployment in rates]
        leader = min(known, key=lambda one: (-rates[one.deployment] * one.scale, one.num_devices))
        return _Round(leader, rates, {})

    def _goodputs_below(
        self, problem: Problem, decision: _Round, others: Sequence[Represented]
    ) -> dict[CandidateDeployment, float]:
        """For the report, in runs of the configured length, and below the leader, as was found in runs at its rate. Of
        a trace: the leader's goodput, times the ratio of the goodputs in one window, that of the search, or else the
        window that limits the leader."""
        leader, rate = decision.leader, decision.rates[decision.leader.deployment]
        below, searched = decision.goodput / RATE_RATIO, decision.leader.candidate.goodput
        window, ratio = self._simulations.deciding_window(problem, leader, rate), 1.0
        known: dict[CandidateDeployment, float] = {}
        if window is not None and searched:
            goodputs = ((one, (one.candidate.goodput or 0.0) * decision.goodput / searched) for one in others)
            known = {one.deployment: min(goodput, below) / one.scale for one, goodput in goodputs if goodput > 0}
        others = [one for one in others if one.deployment not in known]
        guesses = [(one, min(below, one.candidate.predicted) / one.scale) for one in others]
        simulated = self._space.problem
        if window is not None and others:
            simulated = problem.of_window(window).with_requests(_OF_ALTERNATIVES)
            guesses.append((leader, (searched or decision.goodput) / leader.scale))
        found = self._simulations.max_rates_of_part(simulated, [RateTrial(one, guess) for one, guess in guesses])
        if len(found) > len(others):
            in_window = found.pop()
            ratio = rate / in_window if in_window > 0 else 0.0
        rates = zip(others, found, strict=True)
        return known | {one.deployment: min(of_part * ratio, below / one.scale) for one, of_part in rates}

    def _begin(self, text: str) -> None:
        """Of a next part, the number of which is not known before: the bar goes on by a part of the rest."""
        self._report(self._share, text)
        self._share += (1 - self._share) * _PART

    def _represented(self, candidate: EvaluatedDeployment) -> Represented:
        deployment = candidate.deployment
        if deployment.num_instances <= MAX_INSTANCES:
            return Represented(candidate, deployment, 1.0)
        simulated = scaled_down(deployment)
        predicted = self._space.predictor.goodput(simulated)
        return Represented(candidate, simulated, candidate.predicted / predicted if predicted > 0 else 1.0)


def _guess(problem: Problem, one: Represented) -> float:
    """The rate that the search found; a whole trace asks for a little more than the window of the search."""
    found = (one.candidate.goodput or one.candidate.predicted) / one.scale
    return found / RATE_RATIO if problem.windows else found

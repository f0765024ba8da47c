"""The simulations of a final comparison, and what they have shown of each deployment at each rate."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from tandem.core.errors import ConfigError
from tandem.core.slo import SloClass
from tandem.placement.evaluation.attainment import Evaluation, deciding_window
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.mapper import Mapper
from tandem.placement.search.paired_runs import (
    PairedRun,
    RateTrial,
    Represented,
    evaluation_at,
    higher_rate,
    paired_run,
    rate_near,
)
from tandem.placement.search.problem import Problem
from tandem.placement.search.trial import MaxRate, evaluate_at, find_rate_near
from tandem.placement.workload.windows import Window

KnownEvaluations = dict[tuple[CandidateDeployment, int, tuple[SloClass, ...]], Mapping[float, Evaluation]]
"""Of each deployment, number of requests per simulation, and classes: by rate."""


class RateSimulations:
    """Rates are of what is simulated for a deployment, in requests per second. What was simulated once is known, in
    `known`, which another comparison of the same requests may have begun."""

    def __init__(self, mapper: Mapper, known: KnownEvaluations | None = None) -> None:
        self.count = 0
        self._mapper = mapper
        self._evaluated = {} if known is None else known

    def evaluations(self, problem: Problem, one: Represented) -> Mapping[float, Evaluation]:
        """By rate, what is known."""
        return self._evaluated.get((one.deployment, problem.section.requests, problem.classes), {})

    def deciding_window(self, problem: Problem, one: Represented, rate: float) -> Window | None:
        """The window of a trace that limits the deployment, by its first missed rate above `rate`; None if none is
        known."""
        evaluated = self.evaluations(problem, one)
        missed = min((above for above in evaluated if above > rate and not evaluated[above].meets), default=None)
        return deciding_window(problem.windows, evaluated[missed]) if problem.windows and missed is not None else None

    def max_rate(self, problem: Problem, one: Represented, guess: float) -> float:
        """Above 0. Raises ConfigError if a window of a trace, or a longer run than the search had, misses the targets
        at every rate."""
        known = self.evaluations(problem, one)
        found = find_rate_near(problem, one.simulated, guess, self._mapper, separate_nodes=one.is_scaled, known=known)
        if found.rate > 0:
            return self._keep(problem, one, found)
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

    def max_rates(self, problem: Problem, trials: Sequence[RateTrial]) -> list[float]:
        """As `rate_near` finds them."""
        found = self._mapper(partial(rate_near, problem), trials)
        return [self._keep(problem, trial.of, each) for trial, each in zip(trials, found, strict=True)]

    def max_rates_of_part(self, problem: Problem, trials: Sequence[RateTrial]) -> list[float]:
        """As `max_rates`, where `problem` has other requests than the comparison: not known afterwards."""
        found = self._mapper(partial(rate_near, problem), trials)
        self.count += sum(each.num_simulations for each in found)
        return [each.rate for each in found]

    def higher_rates(self, problem: Problem, trials: Sequence[RateTrial]) -> list[float]:
        """As `higher_rate` finds them."""
        found = self._mapper(partial(higher_rate, problem), trials)
        return [self._keep(problem, trial.of, each) for trial, each in zip(trials, found, strict=True)]

    def paired(
        self,
        problem: Problem,
        leader: Represented,
        rate: float,
        rivals: Sequence[Represented],
        window: Window | None = None,
    ) -> tuple[PairedRun, list[PairedRun]]:
        """Runs of the leader at `rate`, and of the rivals at the rates of the same goodput; `window`: of that alone."""
        known = self.evaluations(problem, leader) if window is None else {}
        simulated = problem if window is None else problem.of_window(window)
        run = partial(paired_run, simulated, goodput=rate * leader.scale)
        self.count += len(rivals)
        if rate in known and known[rate].met is not None:
            return PairedRun(rate, known[rate]), self._mapper(run, rivals)
        self.count += 1
        own, *runs = self._mapper(run, [leader, *rivals])
        return own, runs

    def meet(self, problem: Problem, trials: Sequence[RateTrial]) -> list[bool]:
        """Whether each meets the targets at exactly its rate."""
        evaluations = self._mapper(partial(evaluation_at, problem), trials)
        for trial, evaluation in zip(trials, evaluations, strict=True):
            self._keep(problem, trial.of, MaxRate(trial.rate, 1, {trial.rate: evaluation}))
        return [evaluation.meets for evaluation in evaluations]

    def _keep(self, problem: Problem, one: Represented, found: MaxRate) -> float:
        self.count += found.num_simulations
        key = one.deployment, problem.section.requests, problem.classes
        self._evaluated[key] = {**self._evaluated.get(key, {}), **found.evaluated}
        return found.rate

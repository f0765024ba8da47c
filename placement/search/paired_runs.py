"""Simulations of deployments on the same requests, so that their differences are those of the deployments."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tandem.placement.evaluation.attainment import Evaluation, targets_met
from tandem.placement.evaluation.steady_state import Interval, difference_interval
from tandem.placement.search.best_first import EvaluatedDeployment
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.problem import Problem
from tandem.placement.search.trial import (
    MaxRate,
    evaluate_at,
    find_rate_near,
    rate_at,
    rate_index_below,
    simulate_at,
)

WARM_UP_SHARE = 0.25
"""Of a run's requests, which differences leave out."""


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
class RateTrial:
    """What is simulated `of` a deployment, and a rate of it in requests per second; `known` ones are not simulated
    again."""

    of: Represented
    rate: float
    known: Mapping[float, Evaluation] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PairedRun:
    """A complete run at `rate`. `evaluation` has `met`."""

    rate: float
    evaluation: Evaluation

    def difference(self, other: "PairedRun") -> Interval:
        """95 % interval of the attainment of this run minus that of the other, without the first quarter. Runs of
        different lengths begin with the same requests."""
        first, second = self.evaluation.met, other.evaluation.met
        assert first is not None
        assert second is not None
        count = min(len(first), len(second))
        steady = slice(int(WARM_UP_SHARE * count), count)
        return difference_interval(first[steady], second[steady])


def paired_run(problem: Problem, one: Represented, goodput: float) -> PairedRun:
    """A complete run at the rate that corresponds to `goodput`."""
    rate = goodput / one.scale
    result, evaluation = simulate_at(problem, one.simulated, rate, separate_nodes=one.is_scaled, stop_early=False)
    return PairedRun(rate, replace(evaluation, met=targets_met(result, problem.classes)))


def rate_near(problem: Problem, trial: RateTrial) -> MaxRate:
    return find_rate_near(problem, trial.of.simulated, trial.rate, separate_nodes=trial.of.is_scaled, known=trial.known)


def higher_rate(problem: Problem, trial: RateTrial) -> MaxRate:
    """Rate 0 if the deployment misses its targets at the next rate above."""
    one = trial.of
    next_rate = rate_at(rate_index_below(trial.rate) + 1)
    evaluation = evaluate_at(problem, one.simulated, one.is_scaled, next_rate)
    if not evaluation.meets:
        return MaxRate(0.0, 1, {next_rate: evaluation})
    return rate_near(problem, RateTrial(one, next_rate, {next_rate: evaluation}))


def evaluation_at(problem: Problem, trial: RateTrial) -> Evaluation:
    """At exactly that rate, which need not be one of the series."""
    return evaluate_at(problem, trial.of.simulated, trial.of.is_scaled, trial.rate)

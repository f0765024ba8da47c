"""Simulations of deployments on the same requests, so that their differences are those of the deployments."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tandem.placement.evaluation.attainment import targets_met
from tandem.placement.evaluation.steady_state import Interval, difference_interval
from tandem.placement.search.best_first import EvaluatedDeployment
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.problem import Problem
from tandem.placement.search.trial import MaxRate, find_max_rate, find_rate_near, simulate_at

_WARM_UP_SHARE = 0.25


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
    """What is simulated `of` a deployment, and a rate of it in requests per second."""

    of: Represented
    rate: float


@dataclass(frozen=True, slots=True)
class PairedRun:
    """`met`: whether each request met its targets, without the first quarter of the run."""

    meets: bool
    met: npt.NDArray[np.bool_]

    def difference(self, other: "PairedRun") -> Interval:
        """95 % interval of the attainment of this run minus that of the other, a run of the same requests. Runs of
        different lengths begin with the same requests."""
        count = min(len(self.met), len(other.met))
        return difference_interval(self.met[:count], other.met[:count])


def paired_run(problem: Problem, one: Represented, goodput: float) -> PairedRun:
    """A complete run at the rate that corresponds to `goodput`."""
    result, evaluation = simulate_at(
        problem, one.simulated, goodput / one.scale, separate_nodes=one.is_scaled, stop_early=False
    )
    met = targets_met(result, problem.classes)
    return PairedRun(evaluation.meets, met[int(_WARM_UP_SHARE * len(met)) :])


def rate_near(problem: Problem, trial: RateTrial) -> MaxRate:
    return find_rate_near(problem, trial.of.simulated, trial.rate, separate_nodes=trial.of.is_scaled)


def higher_rate(problem: Problem, trial: RateTrial) -> MaxRate:
    """Rate 0 if the deployment misses its targets at the next rate above."""
    return find_max_rate(problem, trial.of.simulated, trial.rate, trial.rate, separate_nodes=trial.of.is_scaled)


def meets_at(problem: Problem, trial: RateTrial) -> bool:
    _, evaluation = simulate_at(problem, trial.of.simulated, trial.rate, separate_nodes=trial.of.is_scaled)
    return evaluation.meets

"""What a change does to the goodput, by simulations of the same requests with and without it.

The interval of the ratio of both goodputs is that of a jackknife (Miller, 1974; with groups, Shao and Wu, 1989): the
requests are divided into 20 batches in order of arrival, and both goodputs are found again without each of the batches,
from the attainment at rates around them. As both leave out the same requests, what is due to these cancels out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from tandem.placement.evaluation.attainment import targets_met
from tandem.placement.evaluation.steady_state import BATCHES, Interval, jackknife_half_width
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.mapper import Mapper
from tandem.placement.search.paired_runs import WARM_UP_SHARE
from tandem.placement.search.problem import Problem
from tandem.placement.search.trial import find_rate_near, rate_at, rate_index_below, simulate_at
from tandem.placement.workload.requests import Floats

# Of the series of rates, from the goodput on. Short runs keep their attainment far beyond it: there is no steady state.
_STEPS = (-10, -6, -3, -1, 0, 1, 3, 6, 10, 16, 25, 40)


@dataclass(frozen=True, slots=True)
class Variant:
    """A deployment for a problem that has the requests of the unchanged one. `guess`: its goodput, roughly."""

    problem: Problem
    deployment: CandidateDeployment
    guess: float


@dataclass(frozen=True, slots=True)
class Effect:
    """Goodput with the change divided by that without, and its 95 % interval."""

    ratio: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class _Curve:
    """Runs at rates around `rate`, the goodput. `met[i]`: whether each request met its targets at the i-th."""

    problem: Problem
    rate: float
    log_rates: Floats
    met: npt.NDArray[np.bool_]  # [rate, request]

    def log_goodputs(self, count: int) -> Floats:
        """By the first `count` requests without the first quarter, and without one of their batches after the other."""
        rows = np.arange(int(WARM_UP_SHARE * count), count)
        batches = np.array_split(rows, BATCHES)
        return np.array([self._log_goodput(np.setdiff1d(rows, batch, assume_unique=True)) for batch in batches])

    def _log_goodput(self, rows: npt.NDArray[np.int64]) -> float:
        """Between the rates, at which the first class misses its attainment."""
        of_classes = []
        for index, slo in enumerate(self.problem.classes):
            of_class = rows[self.problem.requests.slo_class[rows] == index]
            if len(of_class):
                attainment = np.minimum.accumulate(self.met[:, of_class].mean(axis=1))
                of_classes.append(float(np.interp(-slo.attainment, -attainment, self.log_rates)))
        return min(of_classes)


def simulate_effects(unchanged: Variant, changed: Sequence[Variant], mapper: Mapper) -> list[Effect | None]:
    """None if the targets are missed at every rate without the change; a ratio of 0 if they are with it."""
    (curve,) = mapper(_curve, [unchanged])
    return [None] * len(changed) if curve is None else [*mapper(partial(_effect, curve), changed)]


def _effect(unchanged: _Curve, changed: Variant) -> Effect:
    curve = _curve(changed)
    if curve is None:
        return Effect(0.0, (0.0, 0.0))
    count = min(curve.met.shape[1], unchanged.met.shape[1])
    half = jackknife_half_width(curve.log_goodputs(count) - unchanged.log_goodputs(count))
    ratio = curve.rate / unchanged.rate
    return Effect(ratio, (ratio * math.exp(-half), ratio * math.exp(half)))


def _curve(variant: Variant) -> _Curve | None:
    """None if the targets are missed at every rate."""
    problem, deployment = variant.problem, variant.deployment
    rate = find_rate_near(problem, deployment, variant.guess).rate
    if rate == 0:
        return None
    rates = [rate_at(rate_index_below(rate) + step) for step in _STEPS]
    runs = [simulate_at(problem, deployment, each, stop_early=False)[0] for each in rates]
    count = min(len(run.requests) for run in runs)
    met = np.array([targets_met(run, problem.classes)[:count] for run in runs])
    return _Curve(problem, rate, np.log(rates), met)

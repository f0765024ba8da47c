"""Predicts times from a few coefficients, and corrects these by measurements. Pure: no clock.

A `LinearPredictor` starts from a prior (for steps: the calibrated cost model as `core.step_coefficients`) and corrects
it by recursive least squares with forgetting. It minimises the relative error, so that short steps count as much as
long ones. Pauses and other load of the machine disturb the steps of a live instance. So a residual is cut at a bound,
and each coefficient stays within a factor of its prior: no measurement, however wrong, moves the predictor far. If many
residuals in a row are cut on the same side, the instance has changed, and the predictor learns as fast as at its start.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

from tandem.core.cost_model import StepLoad, attention_pairs
from tandem.core.step_coefficients import StepCoefficients, step_terms

FORGETTING = 0.995  # an observation counts half as much after 140 others
MAX_FACTOR = 16.0  # a coefficient is at most this many times its prior, and at least the inverse
_NUM_RESIDUALS = 128
_MIN_RESIDUALS = 8  # with fewer residuals the prior's error is used
_NOISE = 0.1  # relative error of a measured time, one standard deviation
_SIGMAS = 4.0  # residuals beyond this many deviations are cut,
_MIN_BOUND, _MAX_BOUND = 0.2, 0.5  # at a bound between these
_NUM_CUT_FOR_CHANGE = 8  # residuals in a row that are cut on one side: the instance has another speed than before


class Residuals:
    """Relative errors of the last predictions: actual / predicted - 1, at least -1. `error` is half the width of their
    middle 68 %: one standard deviation, if the errors are normal."""

    __slots__ = ("_median", "_prior_error", "_recent", "_sorted", "count", "error")

    def __init__(self, prior_error: float = 0.2) -> None:
        """`prior_error`: the standard deviation that is assumed before there are residuals."""
        self.count = 0  # of all predictions
        self._prior_error = prior_error
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._summarize()

    def add(self, predicted_s: float, actual_s: float) -> float:
        """Add a prediction with its outcome. Returns the residual."""
        residual = actual_s / max(predicted_s, 1e-9) - 1
        self.count += 1
        self._recent.append(residual)
        insort(self._sorted, residual)
        if len(self._recent) > _NUM_RESIDUALS:
            oldest = self._recent.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]
        self._summarize()
        return residual

    def _summarize(self) -> None:
        """Keep `error` and median, which are used far more often than they change."""
        self._median = self.quantile(0.5)
        self.error = (self.quantile(0.84) - self.quantile(0.16)) / 2

    def quantile(self, share: float) -> float:
        """The value that `share` of the recent residuals do not exceed."""
        if len(self._sorted) < _MIN_RESIDUALS:
            return self._prior_error * math.sqrt(2) * _inverse_erf(2 * share - 1)
        return self._sorted[min(len(self._sorted) - 1, int(share * len(self._sorted)))]

    def share_within(self, predicted_s: float, target_s: float, least_error: float) -> float:
        """Probability that a time predicted as `predicted_s` is at most `target_s`, if the errors are normal around
        their median, with a deviation of at least `least_error`."""
        if target_s == math.inf:
            return 1.0
        expected_s = predicted_s * (1 + self._median)
        deviation_s = max(least_error, self.error) * max(predicted_s, 1e-9)
        return 0.5 * math.erfc((expected_s - target_s) / (deviation_s * math.sqrt(2)))


class LinearPredictor:
    """seconds = sum over the terms of coefficient times count. A coefficient with a prior of 0 stays 0."""

    __slots__ = ("_covariance", "_factors", "_forgetting", "_num_cut", "_prior", "_variance", "residuals")

    def __init__(self, prior: Sequence[float], *, prior_error: float = 0.5, forgetting: float = FORGETTING) -> None:
        """`prior_error`: relative error of each prior coefficient, one standard deviation."""
        self.residuals = Residuals(prior_error)
        self._prior = tuple(prior)
        self._factors = [1.0] * len(prior)  # of each coefficient against its prior
        self._forgetting = forgetting
        self._variance = (prior_error / _NOISE) ** 2
        self._num_cut = 0  # residuals in a row that were cut; negative: the times were shorter than predicted
        self._covariance = self._prior_covariance()

    @property
    def coefficients(self) -> tuple[float, ...]:
        return tuple(factor * prior for factor, prior in zip(self._factors, self._prior, strict=True))

    def seconds(self, terms: Sequence[float]) -> float:
        """The predicted time for these counts."""
        return sum(f * p * x for f, p, x in zip(self._factors, self._prior, terms, strict=True))

    def observe(self, terms: Sequence[float], seconds: float) -> None:
        """Learn from a measured time. O(terms^2)."""
        predicted_s = self.seconds(terms)
        if predicted_s <= 0 or not 0 < seconds < math.inf:
            return
        bound = min(_MAX_BOUND, max(_MIN_BOUND, _SIGMAS * self.residuals.error))
        found = self.residuals.add(predicted_s, seconds)
        residual = max(-bound, min(bound, found))
        self._count_cut(0 if residual == found else int(math.copysign(1, found)))
        shares = [prior * count / predicted_s for prior, count in zip(self._prior, terms, strict=True)]
        covariance = self._covariance
        gains = [sum(c * share for c, share in zip(row, shares, strict=True)) for row in covariance]
        scale = self._forgetting + sum(gain * share for gain, share in zip(gains, shares, strict=True))
        for i, gain in enumerate(gains):
            factor = self._factors[i] + gain / scale * residual
            self._factors[i] = min(MAX_FACTOR, max(1 / MAX_FACTOR, factor))
            row = covariance[i]
            for j, other in enumerate(gains):
                row[j] = (row[j] - gain * other / scale) / self._forgetting
        self._bound_covariance()

    def _count_cut(self, side: int) -> None:
        self._num_cut = self._num_cut + side if self._num_cut * side > 0 else side
        if abs(self._num_cut) >= _NUM_CUT_FOR_CHANGE:
            self._num_cut = 0
            self._covariance = self._prior_covariance()

    def _prior_covariance(self) -> list[list[float]]:
        size = len(self._prior)
        return [[self._variance * (row == column) for column in range(size)] for row in range(size)]

    def _bound_covariance(self) -> None:
        """Forgetting makes coefficients that no observation contains more uncertain with each step; bound their
        variance by the prior's."""
        for i, row in enumerate(self._covariance):
            if row[i] > self._variance:
                shrink = math.sqrt(self._variance / row[i])
                for j in range(len(row)):
                    row[j] *= shrink
                    self._covariance[j][i] *= shrink


class StepPredictor:
    """Step times of one instance."""

    __slots__ = ("_linear",)

    def __init__(self, prior: StepCoefficients) -> None:
        self._linear = LinearPredictor(prior)

    @property
    def coefficients(self) -> StepCoefficients:
        return StepCoefficients(*self._linear.coefficients)

    @property
    def residuals(self) -> Residuals:
        return self._linear.residuals

    def step_s(self, load: StepLoad) -> float:
        return self._linear.seconds(step_terms(load))

    def observe(self, load: StepLoad, seconds: float) -> None:
        self._linear.observe(step_terms(load), seconds)


def prefill_s(costs: StepCoefficients, uncached: int, cached: int, step_tokens: int) -> float:
    """Time of a prompt that is alone on its instance: `uncached` tokens after `cached` ones, in steps of at most
    `step_tokens` tokens."""
    whole_steps, rest = divmod(uncached, step_tokens)
    total_s = costs.pair_s * attention_pairs(cached, uncached)
    if whole_steps:
        total_s += whole_steps * costs.seconds(StepLoad(prefill_tokens=step_tokens))
    return total_s + (costs.seconds(StepLoad(prefill_tokens=rest)) if rest else 0.0)


def _inverse_erf(value: float) -> float:
    """The inverse error function on (-1, 1), by Winitzki's approximation; relative error below 0.4 %."""
    log_term = math.log1p(-value * value)
    first = 2 / (math.pi * 0.147) + log_term / 2
    return math.copysign(math.sqrt(math.sqrt(first * first - log_term / 0.147) - first), value)

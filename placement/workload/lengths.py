"""Prompt and output lengths: truncated distributions, measured tables, and mixtures of both.

A sampler maps rows of uniform numbers to rows of lengths. So a seed gives the same first requests for any number of
requests, whatever the distributions of arrivals and classes are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

from tandem.core.errors import ConfigError
from tandem.core.slo_file import LengthPart, LengthSection
from tandem.placement.workload.length_tables import read_table
from tandem.placement.workload.requests import Floats, Ints

LengthSampler = Callable[[Floats], Ints]
"""Uniform numbers in [0, 1), [n, 2] -> prompt and output tokens, [n, 2], each at least 1."""
OneLength = Callable[[Floats], Ints]
"""Uniform numbers in [0, 1), [n] -> tokens, [n], each at least 1."""

_BELOW_ONE = math.nextafter(1.0, 0.0)
_EXTREME = 1e-7  # distance of an exponential distribution's mean from the ends of what is possible, in its range
_MAX_EXPONENT = 700.0


@dataclass(frozen=True, slots=True)
class TruncatedLogNormal:
    """exp of a normal variable of mean `mu` and deviation `sigma` > 0, on the condition that it lies in [low, high]."""

    mu: float
    sigma: float
    low: float
    high: float

    @classmethod
    def of_moments(cls, mean: float, cv: float, low: float, high: float) -> "TruncatedLogNormal":
        """The distribution that has this mean and coefficient of variation after truncation. Raises ConfigError if none
        has: with given bounds and mean, the variation is largest for an infinite sigma, a truncated power law."""

        def with_sigma(log_sigma: float) -> TruncatedLogNormal:
            return cls._of_mean(mean, math.exp(log_sigma), low, high)

        if not 1.002 * low < mean < high / 1.002:
            raise ConfigError(f"mean {mean:g} is too close to min {low:g} or max {high:g} for cv {cv:g}; set cv 0")
        narrow, wide = math.log(1e-4), math.log(20.0)
        max_cv = with_sigma(wide).cv
        if cv > max_cv:
            raise ConfigError(
                f"no log-normal of mean {mean:g} between {low:g} and {high:g} has a cv of {cv:g}; the maximum is "
                f"{max_cv:.2f}: lower cv or widen min and max"
            )
        return with_sigma(float(brentq(lambda log_sigma: with_sigma(log_sigma).cv - cv, narrow, wide, xtol=1e-9)))

    @classmethod
    def _of_mean(cls, mean: float, sigma: float, low: float, high: float) -> "TruncatedLogNormal":
        # The mean grows with mu. At both ends nearly all mass is within 0.1 % of low or of high.
        span = 1000.0 * sigma * sigma + 10.0 * sigma
        first, last = math.log(low) - span, math.log(high) + span
        mu = brentq(lambda mu: cls(mu, sigma, low, high).moment(1) - mean, first, last, xtol=1e-10)
        return cls(float(mu), sigma, low, high)

    def moment(self, power: int) -> float:
        """Mean of the `power`-th power."""
        shift = power * self.sigma
        log_mass = self._log_mass(shift) - self._log_mass(0.0)
        return math.exp(power * self.mu + shift * shift / 2 + log_mass)

    @property
    def cv(self) -> float:
        mean = self.moment(1)
        return math.sqrt(max(0.0, self.moment(2) / (mean * mean) - 1))

    def sample(self, uniform: Floats) -> Ints:
        """By inversion of the distribution function."""
        first, last = self._score(self.low), self._score(self.high)
        if first > 0:  # in the upper tail 1 - p loses all digits: use the symmetry of the normal distribution
            score = -ndtri(ndtr(-first) + uniform * (ndtr(-last) - ndtr(-first)))
        else:
            score = ndtri(ndtr(first) + uniform * (ndtr(last) - ndtr(first)))
        return _rounded(np.exp(self.mu + self.sigma * score), self.low, self.high)

    def _score(self, value: float) -> float:
        return (math.log(value) - self.mu) / self.sigma

    def _log_mass(self, shift: float) -> float:
        """log of the normal distribution's mass between the bounds minus `shift`."""
        first, last = self._score(self.low) - shift, self._score(self.high) - shift
        if first > 0:
            first, last = -last, -first
        lower, upper = float(log_ndtr(first)), float(log_ndtr(last))
        return upper + math.log(-math.expm1(min(lower - upper, -1e-300)))


@dataclass(frozen=True, slots=True)
class Exponential:
    """A density that falls by `rate` > 0 in each unit, on [low, high]."""

    rate: float
    low: float
    high: float

    @classmethod
    def of_mean(cls, mean: float, low: float, high: float) -> "Exponential":
        """Raises ConfigError if the mean is not in the lower half of the range, or is at its end."""
        share = (mean - low) / (high - low)
        if not _EXTREME < share < 0.5 - _EXTREME:
            raise ConfigError(
                f"no exponential distribution between {low:g} and {high:g} has the mean {mean:g}; it must be more than "
                f"min and less than {(low + high) / 2:g}"
            )

        def excess(log_rate: float) -> float:
            rate = math.exp(log_rate)
            return 1 / rate - 1 / math.expm1(rate) - share if rate < _MAX_EXPONENT else 1 / rate - share

        log_rate = float(brentq(excess, math.log(1e-5), math.log(2 / _EXTREME), xtol=1e-12))
        return cls(math.exp(log_rate) / (high - low), low, high)

    def sample(self, uniform: Floats) -> Ints:
        return _rounded(self.quantile(uniform), self.low, self.high)

    def quantile(self, uniform: Floats) -> Floats:
        values: Floats = self.low - np.log1p(uniform * math.expm1(-self.rate * (self.high - self.low))) / self.rate
        return values


@dataclass(frozen=True, slots=True)
class Pareto:
    """The density falls with the power `exponent` + 1 of the length, on [low, high]: its logarithm is exponential."""

    exponent: float
    low: float
    high: float

    @classmethod
    def of_mean(cls, mean: float, low: float, high: float) -> "Pareto":
        """Raises ConfigError if no exponent above 0 has this mean."""
        span = math.log(high / low)

        def integral(power: float) -> float:
            return span if power == 0 else -math.expm1(-power * span) / power

        def log_mean(exponent: float) -> float:
            return math.log(low * integral(exponent - 1) / integral(exponent))

        least, most = 1e-6, 1e4
        if not log_mean(most) < math.log(mean) < log_mean(least):
            raise ConfigError(
                f"no Pareto distribution between {low:g} and {high:g} has the mean {mean:g}; it must be more than min "
                f"and less than {math.exp(log_mean(least)):.0f}"
            )
        exponent = brentq(lambda exponent: log_mean(exponent) - math.log(mean), least, most, xtol=1e-10)
        return cls(float(exponent), low, high)

    def sample(self, uniform: Floats) -> Ints:
        logarithms = Exponential(self.exponent, math.log(self.low), math.log(self.high)).quantile(uniform)
        return _rounded(np.exp(logarithms), self.low, self.high)


def _rounded(values: Floats, low: float, high: float) -> Ints:
    """Whole numbers. Rounding changes the mean by less than half a token."""
    tokens: Ints = np.clip(np.rint(values), math.ceil(low), math.floor(high)).astype(np.int64)
    return tokens


def lengths_of(section: LengthSection | LengthPart) -> OneLength:
    """Raises ConfigError if no distribution has these moments between min and max, and for a wrong table."""
    if isinstance(section, LengthSection) and section.mixture:
        return _mixture([(part.share, lengths_of(part)) for part in section.mixture])
    if section.table is not None:
        return read_table(section.table).sample
    assert section.mean is not None
    mean, low, high = section.mean, section.min, section.max
    if section.cv == 0 or low == high:
        return lambda uniform: np.full(len(uniform), max(1, round(mean)), dtype=np.int64)
    if section.distribution == "log-normal":
        return TruncatedLogNormal.of_moments(mean, section.cv, low, high).sample
    return (Exponential if section.distribution == "exponential" else Pareto).of_mean(mean, low, high).sample


def _mixture(parts: Sequence[tuple[float, OneLength]]) -> OneLength:
    """Uniform numbers select a part by its share; their position within the share is that within the part."""
    ends = np.cumsum([share for share, _ in parts])

    def sample(uniform: Floats) -> Ints:
        scaled = uniform * ends[-1]
        chosen = np.searchsorted(ends[:-1], scaled, side="right")
        lengths = np.empty(len(uniform), dtype=np.int64)
        for index, (share, part) in enumerate(parts):
            rows = chosen == index
            within = (scaled[rows] - (ends[index] - share)) / share
            lengths[rows] = part(np.clip(within, 0.0, _BELOW_ONE))
        return lengths

    return sample


def independent_sampler(prompt: OneLength, output: OneLength) -> LengthSampler:
    """Prompt and output lengths are independent."""
    return lambda uniform: np.stack([prompt(uniform[:, 0]), output(uniform[:, 1])], axis=1)

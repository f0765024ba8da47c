"""Prompt and output lengths: truncated log-normal distributions and measured tables.

A sampler maps rows of uniform numbers to rows of lengths. So a seed gives the same first requests for any number of
requests, whatever the distributions of arrivals and classes are.
"""

import csv
import gzip
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

from tandem.core.errors import ConfigError
from tandem.core.slo_file import LengthSection
from tandem.placement.workload.requests import Floats, Ints

LengthSampler = Callable[[Floats], Ints]
"""Uniform numbers in [0, 1), [n, 2] -> prompt and output tokens, [n, 2], each at least 1."""


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
        """Whole numbers, by inversion of the distribution function. Rounding changes the mean by less than half a
        token."""
        first, last = self._score(self.low), self._score(self.high)
        if first > 0:  # in the upper tail 1 - p loses all digits: use the symmetry of the normal distribution
            score = -ndtri(ndtr(-first) + uniform * (ndtr(-last) - ndtr(-first)))
        else:
            score = ndtri(ndtr(first) + uniform * (ndtr(last) - ndtr(first)))
        values: Floats = np.exp(self.mu + self.sigma * score)
        tokens: Ints = np.clip(np.rint(values), math.ceil(self.low), math.floor(self.high)).astype(np.int64)
        return tokens

    def _score(self, value: float) -> float:
        return (math.log(value) - self.mu) / self.sigma

    def _log_mass(self, shift: float) -> float:
        """log of the normal distribution's mass between the bounds minus `shift`."""
        first, last = self._score(self.low) - shift, self._score(self.high) - shift
        if first > 0:
            first, last = -last, -first
        lower, upper = float(log_ndtr(first)), float(log_ndtr(last))
        return upper + math.log(-math.expm1(min(lower - upper, -1e-300)))


def lengths_of(section: LengthSection) -> Callable[[Floats], Ints]:
    """Uniform numbers -> lengths. Raises ConfigError if no log-normal has this mean and cv between min and max."""
    if section.cv == 0 or section.min == section.max:
        return lambda uniform: np.full(len(uniform), max(1, round(section.mean)), dtype=np.int64)
    return TruncatedLogNormal.of_moments(section.mean, section.cv, section.min, section.max).sample


def table_sampler(table: Ints) -> LengthSampler:
    """Draws rows of `table` [n, 2] with replacement, so prompt and output lengths stay correlated."""
    return lambda uniform: table[np.floor(uniform[:, 0] * len(table)).astype(np.int64)]


def independent_sampler(prompt: Callable[[Floats], Ints], output: Callable[[Floats], Ints]) -> LengthSampler:
    """Prompt and output lengths are independent."""
    return lambda uniform: np.stack([prompt(uniform[:, 0]), output(uniform[:, 1])], axis=1)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A built-in data set of lengths: a table in placement/data, or distributions. Requests with more than
    `max_total_tokens` prompt and output tokens are left out."""

    summary: str
    table: str | None = None
    prompt: TruncatedLogNormal | None = None
    output: TruncatedLogNormal | None = None
    max_total_tokens: int | None = None

    def sampler(self) -> LengthSampler:
        if self.table is not None:
            return table_sampler(_read_table(self.table))
        assert self.prompt is not None
        assert self.output is not None
        return independent_sampler(self.prompt.sample, self.output.sample)


# DistServe's data sets are not public; their means and limits are (OSDI '24, Figure 7 and section 6.1). These values of
# mu give those means after the limit on the sum; sigma reproduces the published attainment curves. The resulting
# quantiles of distserve_sharegpt: p50 663 and 137, p90 1,454 and 436.
DATASETS: Mapping[str, Dataset] = MappingProxyType(
    {
        "sharegpt": Dataset("ShareGPT, first turns, Llama-2 tokens", table="lengths_sharegpt.csv.gz"),
        "openchat": Dataset("ShareGPT-4, many turns, Llama-2 tokens", table="lengths_openchat.csv.gz"),
        "humaneval": Dataset("HumanEval code completion, OPT tokens", table="lengths_humaneval.csv.gz"),
        "arxiv": Dataset("arXiv summaries, Llama-2 tokens", table="lengths_arxiv.csv.gz"),
        "azure_conv": Dataset("Azure 2023, conversation service", table="lengths_azure_conv.csv.gz"),
        "azure_code": Dataset("Azure 2023, code completion service", table="lengths_azure_code.csv.gz"),
        "distserve_sharegpt": Dataset(
            "DistServe's ShareGPT by its means, 755.5 and 200.3 tokens",
            prompt=TruncatedLogNormal(6.76152, 0.95, 0.5, 2047.49),
            output=TruncatedLogNormal(4.96681, 0.95, 0.5, 2047.49),
            max_total_tokens=2047,
        ),
        "distserve_longbench": Dataset(
            "DistServe's LongBench by its means, 1,738.3 and 90.7 tokens",
            prompt=TruncatedLogNormal(14.76709, 0.95, 0.5, 2040.49),
            output=TruncatedLogNormal(4.54877, 0.95, 0.5, 2040.49),
            max_total_tokens=2040,
        ),
    }
)


def dataset(name: str) -> Dataset:
    """Raises ConfigError for an unknown name."""
    if name not in DATASETS:
        raise ConfigError(f"workload.dataset '{name}' is unknown; the built-in data sets are {', '.join(DATASETS)}")
    return DATASETS[name]


@cache
def _read_table(name: str) -> Ints:
    packed = files("tandem.placement").joinpath("data", name).read_bytes()
    rows = csv.reader(gzip.decompress(packed).decode().splitlines()[1:])
    table = np.array([[int(prompt), int(output)] for prompt, output in rows], dtype=np.int64)
    table.setflags(write=False)
    return table

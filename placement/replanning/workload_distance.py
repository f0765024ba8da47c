"""How far the requests of a window are from those that a plan was made for.

A difference counts only when it is both significant and large. Significance alone means nothing for a plan: with enough
requests every difference is significant. Size alone means nothing in a small window.

- Lengths: the two-sample Kolmogorov-Smirnov statistic, the largest distance between the two distribution functions,
  against its asymptotic critical value.
- Rate: the logarithm of the ratio. The number of arrivals in a window has the relative standard error cv / sqrt(n) for
  arrivals of that coefficient of variation (renewal theory), so bursts are not taken for growth.
- Prompt tokens that a prefix cache has: the difference of the shares.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from tandem.core.plan import Plan
from tandem.core.replanning import Change
from tandem.core.slo_file import SloFile
from tandem.core.workload_profile import ProfileSnapshot
from tandem.placement.workload.requests import RequestStream

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """What is compared: sorted lengths, requests per second with its relative standard error, and the share of prompt
    tokens that are, or can be, in a prefix cache."""

    prompt_tokens: Ints
    output_tokens: Ints
    rate: float
    rate_error: float
    cached_share: float

    @classmethod
    def planned(cls, stream: RequestStream, rate: float) -> "Workload":
        """Of the requests that a plan was judged on, at `rate`, which is exact."""
        cached_share = float(stream.prefix_tokens.sum() / stream.prompt_tokens.sum())
        return cls(np.sort(stream.prompt_tokens), np.sort(stream.output_tokens), rate, 0.0, cached_share)

    @classmethod
    def live(cls, snapshot: ProfileSnapshot) -> "Workload":
        return cls(
            prompt_tokens=np.sort(np.array(snapshot.prompt_tokens, dtype=np.int64)),
            output_tokens=np.sort(np.array(snapshot.output_tokens, dtype=np.int64)),
            rate=max(1, snapshot.arrivals) / snapshot.window_s,
            rate_error=snapshot.arrival_cv / math.sqrt(max(1, snapshot.arrivals)),
            cached_share=sum(snapshot.cached_tokens) / max(1, sum(snapshot.prompt_tokens)),
        )

    @classmethod
    def pooled(cls, windows: Sequence["Workload"]) -> "Workload":
        """Several windows, at least one, as one."""
        count = len(windows)
        return cls(
            prompt_tokens=np.sort(np.concatenate([one.prompt_tokens for one in windows])),
            output_tokens=np.sort(np.concatenate([one.output_tokens for one in windows])),
            rate=sum(one.rate for one in windows) / count,
            rate_error=math.hypot(*(one.rate_error for one in windows)) / count,
            cached_share=sum(one.cached_share for one in windows) / count,
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """From which size on a difference matters, and how unlikely chance must be.

    `rate_rise` and `rate_fall` are factors above 1; infinite where such a change asks nothing of a plan. `length` was
    chosen on the Azure traces of 2023: within one of them, windows of 300 s differ from the whole by up to 0.24, while
    code and conversation differ by 0.35 (prompts) and 0.81 (answers). `false_alarm` is for a whole window, all four
    comparisons together.
    """

    rate_rise: float = 1.5
    rate_fall: float = 1.5
    length: float = 0.25
    cached_share: float = 0.15
    false_alarm: float = 0.01


def limits_of(plan: Plan, slo_file: SloFile) -> Limits:
    """A rate may rise by the room that the plan has; that it falls counts only where fewer devices would be cheaper.

    A plan without expectations has the usual room.
    """
    usual = Limits()
    room = plan.expected.goodput / plan.expected.rate if plan.expected else usual.rate_rise
    return Limits(
        rate_rise=max(1.1, room),
        rate_fall=usual.rate_fall if slo_file.objective == "cheapest" else math.inf,
    )


def compare(planned: Workload, live: Workload, limits: Limits) -> tuple[Change, ...]:
    """In the order rate, prompt_tokens, output_tokens, cached_share."""
    alpha = limits.false_alarm / 4  # Bonferroni: four comparisons
    return (
        _rate(planned, live, limits, alpha),
        _length("prompt_tokens", planned.prompt_tokens, live.prompt_tokens, limits, alpha),
        _length("output_tokens", planned.output_tokens, live.output_tokens, limits, alpha),
        _cached(planned, live, limits, alpha),
    )


def strength(changes: tuple[Change, ...]) -> float:
    return max(change.strength for change in changes)


def ks_statistic(first: Ints, second: Ints) -> float:
    """Largest distance of the empirical distribution functions of two sorted arrays that are not empty; in [0, 1]."""
    values = np.concatenate((first, second))
    shares = [np.searchsorted(array, values, side="right") / len(array) for array in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def ks_critical(num_first: int, num_second: int, alpha: float) -> float:
    """What the statistic exceeds with probability `alpha` when nothing differs; conservative for whole numbers."""
    return math.sqrt(-math.log(alpha / 2) / 2 * (1 / num_first + 1 / num_second))


def _length(name: str, planned: Ints, live: Ints, limits: Limits, alpha: float) -> Change:
    size = ks_statistic(planned, live)
    is_significant = size > ks_critical(len(planned), len(live), alpha)
    return Change(name, float(planned.mean()), float(live.mean()), size / limits.length if is_significant else 0.0)


def _rate(planned: Workload, live: Workload, limits: Limits, alpha: float) -> Change:
    log_ratio = math.log(live.rate / planned.rate)
    error = math.hypot(planned.rate_error, live.rate_error)
    limit = limits.rate_rise if log_ratio > 0 else limits.rate_fall
    is_significant = abs(log_ratio) > _z(alpha) * error
    return Change("rate", planned.rate, live.rate, abs(log_ratio) / math.log(limit) if is_significant else 0.0)


def _cached(planned: Workload, live: Workload, limits: Limits, alpha: float) -> Change:
    """0.5 / sqrt(n) is the largest standard error that a share of n can have."""
    size = abs(live.cached_share - planned.cached_share)
    is_significant = size > _z(alpha) * 0.5 / math.sqrt(len(live.prompt_tokens))
    strength = size / limits.cached_share if is_significant else 0.0
    return Change("cached_share", planned.cached_share, live.cached_share, strength)


def _z(alpha: float) -> float:
    return NormalDist().inv_cdf(1 - alpha / 2)

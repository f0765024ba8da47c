"""The difference between the workload of a window and the planned workload.

A difference counts only if it is significant and large. With enough requests every difference is significant; in a
small window a large difference may be chance.

- Lengths: the two-sample Kolmogorov-Smirnov statistic, the largest distance between the two distribution functions,
  with its asymptotic critical value.
- Rate: the logarithm of the ratio. The number of arrivals in a window has the relative standard error cv / sqrt(n) for
  arrivals with the coefficient of variation cv (renewal theory), so bursts do not count as growth.
- Cached prompt tokens: the difference of the shares.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from tandem.core.plan import Plan
from tandem.core.replanning import WorkloadChange
from tandem.core.slo_file import SloFile
from tandem.core.workload_profile import ProfileSnapshot
from tandem.placement.workload.requests import Ints, RequestStream


@dataclass(frozen=True, slots=True, eq=False)
class WorkloadStats:
    """Sorted lengths, requests per second with relative standard error, and the share of prompt tokens that are, or can
    be, in a prefix cache."""

    prompt_tokens: Ints
    output_tokens: Ints
    rate: float
    rate_error: float
    cached_share: float

    @classmethod
    def planned(cls, stream: RequestStream, rate: float) -> "WorkloadStats":
        """The workload of a plan's simulations at `rate`, which is exact."""
        cached_share = float(stream.prefix_tokens.sum() / stream.prompt_tokens.sum())
        return cls(np.sort(stream.prompt_tokens), np.sort(stream.output_tokens), rate, 0.0, cached_share)

    @classmethod
    def live(cls, snapshot: ProfileSnapshot) -> "WorkloadStats":
        return cls(
            prompt_tokens=np.sort(np.array(snapshot.prompt_tokens, dtype=np.int64)),
            output_tokens=np.sort(np.array(snapshot.output_tokens, dtype=np.int64)),
            rate=max(1, snapshot.arrivals) / snapshot.window_s,
            rate_error=snapshot.arrival_cv / math.sqrt(max(1, snapshot.arrivals)),
            cached_share=sum(snapshot.cached_tokens) / max(1, sum(snapshot.prompt_tokens)),
        )

    @classmethod
    def pooled(cls, windows: Sequence["WorkloadStats"]) -> "WorkloadStats":
        """Several windows, at least one, as one window."""
        count = len(windows)
        return cls(
            prompt_tokens=np.sort(np.concatenate([window.prompt_tokens for window in windows])),
            output_tokens=np.sort(np.concatenate([window.output_tokens for window in windows])),
            rate=sum(window.rate for window in windows) / count,
            rate_error=math.hypot(*(window.rate_error for window in windows)) / count,
            cached_share=sum(window.cached_share for window in windows) / count,
        )


@dataclass(frozen=True, slots=True)
class DriftThresholds:
    """The sizes from which differences count, and the probability of a false alarm.

    `rate_rise` and `rate_fall` are factors above 1; infinite if such a change does not matter for the plan. `length`
    comes from the Azure traces of 2023: within one trace, windows of 300 s differ from the complete trace by up to
    0.24; code and conversation differ by 0.35 (prompts) and 0.81 (outputs). `false_alarm` is for all four comparisons
    of a window together.
    """

    rate_rise: float = 1.5
    rate_fall: float = 1.5
    length: float = 0.25
    cached_share: float = 0.15
    false_alarm: float = 0.01


def thresholds_for(plan: Plan, slo_file: SloFile) -> DriftThresholds:
    """The rate may rise up to the plan's goodput (by the default factor for a plan without predictions). A lower rate
    counts only for the objective `cheapest`."""
    default = DriftThresholds()
    rate_rise = plan.expected.goodput / plan.expected.rate if plan.expected else default.rate_rise
    return DriftThresholds(
        rate_rise=max(1.1, rate_rise),
        rate_fall=default.rate_fall if slo_file.objective == "cheapest" else math.inf,
    )


def compare(planned: WorkloadStats, live: WorkloadStats, thresholds: DriftThresholds) -> tuple[WorkloadChange, ...]:
    """In the order rate, prompt_tokens, output_tokens, cached_share."""
    alpha = thresholds.false_alarm / 4  # Bonferroni: four comparisons
    return (
        _rate(planned, live, thresholds, alpha),
        _length("prompt_tokens", planned.prompt_tokens, live.prompt_tokens, thresholds, alpha),
        _length("output_tokens", planned.output_tokens, live.output_tokens, thresholds, alpha),
        _cached(planned, live, thresholds, alpha),
    )


def strength(changes: tuple[WorkloadChange, ...]) -> float:
    return max(change.strength for change in changes)


def ks_statistic(first: Ints, second: Ints) -> float:
    """Largest distance of the empirical distribution functions of two sorted arrays that are not empty; in [0, 1]."""
    values = np.concatenate((first, second))
    shares = [np.searchsorted(array, values, side="right") / len(array) for array in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def ks_critical(num_first: int, num_second: int, alpha: float) -> float:
    """The value that the statistic exceeds with probability `alpha` for equal distributions; conservative for
    integers."""
    return math.sqrt(-math.log(alpha / 2) / 2 * (1 / num_first + 1 / num_second))


def _length(name: str, planned: Ints, live: Ints, thresholds: DriftThresholds, alpha: float) -> WorkloadChange:
    size = ks_statistic(planned, live)
    is_significant = size > ks_critical(len(planned), len(live), alpha)
    return WorkloadChange(
        name, float(planned.mean()), float(live.mean()), size / thresholds.length if is_significant else 0.0
    )


def _rate(planned: WorkloadStats, live: WorkloadStats, thresholds: DriftThresholds, alpha: float) -> WorkloadChange:
    log_ratio = math.log(live.rate / planned.rate)
    error = math.hypot(planned.rate_error, live.rate_error)
    limit = thresholds.rate_rise if log_ratio > 0 else thresholds.rate_fall
    is_significant = abs(log_ratio) > _z(alpha) * error
    return WorkloadChange("rate", planned.rate, live.rate, abs(log_ratio) / math.log(limit) if is_significant else 0.0)


def _cached(planned: WorkloadStats, live: WorkloadStats, thresholds: DriftThresholds, alpha: float) -> WorkloadChange:
    """0.5 / sqrt(n) is the largest possible standard error of a share of n."""
    size = abs(live.cached_share - planned.cached_share)
    is_significant = size > _z(alpha) * 0.5 / math.sqrt(len(live.prompt_tokens))
    strength = size / thresholds.cached_share if is_significant else 0.0
    return WorkloadChange("cached_share", planned.cached_share, live.cached_share, strength)


def _z(alpha: float) -> float:
    return NormalDist().inv_cdf(1 - alpha / 2)

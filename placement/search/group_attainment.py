"""Attainment of a group of equal prefill, decode or colocated instances against rate, by the fast models.

Rates come from a fixed geometric series below the kind's limit, so the result depends only on the group.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from tandem.core.slo import SloClass
from tandem.placement.search.colocated_model import colocated_latencies_s
from tandem.placement.search.decode_model import decode_time_s
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.prefill_model import StepTimes, prefill_ttft_s
from tandem.placement.workload.requests import Floats, RequestStream

_GROUP_SIZES = (1, 2, 4, 8)  # larger groups share their queue only slightly better
_RATE_RATIO = 1.06
_NUM_RATES = 80
_UNLOADED_TOLERANCE = 0.004  # distance from the attainment without load at which the series ends
_WARM_UP_SHARE = 0.25
_LIFETIMES = 5  # of a full batch: the minimum length of a run

Shares = npt.NDArray[np.float64]  # one per SLO class


@dataclass(frozen=True, slots=True)
class AttainmentKey:
    """`transfer_s_per_token`: seconds per prompt token that the KV transfer adds to a request's decode time."""

    kind: InstanceKind
    instances: int  # one of _GROUP_SIZES
    limit: float  # requests per second of one instance
    transfer_s_per_token: float = 0.0

    @classmethod
    def of(
        cls, kind: InstanceKind, instances: int, limit: float, transfer_s_per_token: float, num_requests: int
    ) -> "AttainmentKey":
        """The largest group size up to `instances` that `num_requests` requests bring to a steady state."""
        maximum = instances
        if kind.role != "prefill":
            maximum = min(instances, num_requests // (_LIFETIMES * kind.max_batch))
        return cls(kind, max(size for size in _GROUP_SIZES if size <= max(1, maximum)), limit, transfer_s_per_token)


@dataclass(frozen=True, slots=True)
class GroupAttainment:
    """`rates` are per instance and ascend; `shares[i]` has the share of each class's requests that meet the target at
    `rates[i]`. Lower rates have the shares of the lowest rate, higher rates the share 0."""

    rates: Floats
    shares: npt.NDArray[np.float64]  # [rate, class]

    def at(self, rate: float) -> Shares:
        if len(self.rates) == 0 or rate > self.rates[-1]:
            return np.zeros(self.shares.shape[1])
        return np.array([np.interp(rate, self.rates, column) for column in self.shares.T])


def group_attainment(key: AttainmentKey, *, stream: RequestStream, classes: Sequence[SloClass]) -> GroupAttainment:
    """The attainment from its value without load to just below the required attainment."""
    if key.limit == 0:
        return GroupAttainment(np.zeros(0), np.zeros((0, len(classes))))
    required = np.array([slo.attainment for slo in classes])
    times = StepTimes(key.kind.cost)

    @cache
    def shares_at(step: int) -> Shares:
        return _shares(key, times, stream.scaled_to(_rate(key, step) * key.instances), classes)

    unloaded = shares_at(_NUM_RATES)
    first_met = _first(lambda step: bool(np.all(shares_at(step) >= required)))
    rates: list[float] = []
    rows: list[Shares] = []
    for step in _steps_from(max(0, first_met - 1)):
        rows.append(shares_at(step))
        rates.append(_rate(key, step))
        if np.all(rows[-1] >= unloaded - _UNLOADED_TOLERANCE):
            break
    # More load never helps; differences in the other direction are noise.
    shares = np.minimum.accumulate(np.array(rows[::-1]).reshape(-1, len(classes)))
    return GroupAttainment(np.array(rates[::-1]), shares)


def _steps_from(first: int) -> Iterator[int]:
    """`first`, the next, then every second, fourth, and so on: two steps of each distance. The attainment changes most
    where it begins to be met."""
    step, distance = first, 1
    while step < _NUM_RATES:
        yield step
        if step + distance < _NUM_RATES:
            yield step + distance
        step, distance = step + 2 * distance, 2 * distance


def _rate(key: AttainmentKey, step: int) -> float:
    return float(key.limit * _RATE_RATIO**-step)


def _first(holds: Callable[[int], bool]) -> int:
    """The first step for which the predicate holds, by bisection; `_NUM_RATES` if there is none."""
    low, high = 0, _NUM_RATES
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _shares(key: AttainmentKey, times: StepTimes, requests: RequestStream, classes: Sequence[SloClass]) -> Shares:
    """The share of each class's requests that meet the targets of the kind's role."""
    met = _targets_met(key, times, requests, classes)
    steady = slice(int(_WARM_UP_SHARE * len(requests)), None)
    met, slo_class = met[steady], requests.slo_class[steady]
    return np.array(
        [met[slo_class == index].mean() if np.any(slo_class == index) else 1.0 for index in range(len(classes))]
    )


def _targets_met(
    key: AttainmentKey, times: StepTimes, requests: RequestStream, classes: Sequence[SloClass]
) -> npt.NDArray[np.bool_]:
    kind, arrival_s = key.kind, requests.arrival_s
    prompts, outputs = requests.prompt_tokens.tolist(), requests.output_tokens.tolist()
    ttft_target_s = np.array([slo.ttft_s for slo in classes])[requests.slo_class]
    # A response of one token has the decode time 0 and meets the resulting target of 0.
    time_target_s = np.array([slo.tpot_s for slo in classes])[requests.slo_class] * (requests.output_tokens - 1)
    met: npt.NDArray[np.bool_]
    if kind.role == "prefill":
        budget = kind.max_batch_tokens
        ttft_s = prefill_ttft_s(times, arrival_s, prompts, instances=key.instances, max_batch_tokens=budget)
        met = ttft_s <= ttft_target_s
    elif kind.role == "decode":
        time_s = decode_time_s(kind, arrival_s, prompts, outputs, instances=key.instances)
        time_s += np.where(requests.output_tokens > 1, key.transfer_s_per_token * requests.prompt_tokens, 0.0)
        met = time_s <= time_target_s
    else:
        ttft_s, time_s = colocated_latencies_s(kind, arrival_s, prompts, outputs, instances=key.instances)
        met = (ttft_s <= ttft_target_s) & (time_s <= time_target_s)
    return met

"""Attainment of a pool of equal instances against rate: prefill alone, decode alone, or both colocated.

Its rates are a fixed ladder below the kind's limit, so that equal questions have equal answers whatever else is asked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from tandem.core.slo import SloClass
from tandem.placement.search.colocated_alone import latencies_colocated
from tandem.placement.search.decode_alone import decode_time_alone
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.prefill_alone import StepTimes, ttft_alone
from tandem.placement.workload.requests import Floats, RequestStream

POOL_SIZES = (1, 2, 4, 8)  # queues of more instances hardly share better
_LADDER_STEP = 1.06
_LADDER_LENGTH = 80
_NEARLY = 0.004  # as many requests more would meet their targets without any load
_WARM_UP_SHARE = 0.25
_LIFETIMES = 5  # of full batches that a run is to last

Shares = npt.NDArray[np.float64]  # one per SLO class


@dataclass(frozen=True, slots=True)
class CurveKey:
    """`transfer_s_per_token`: what moving KV adds to the time between a request's first and last token."""

    kind: InstanceKind
    instances: int  # one of POOL_SIZES
    limit: float  # requests per second of one instance
    transfer_s_per_token: float = 0.0

    @classmethod
    def of(
        cls, kind: InstanceKind, instances: int, limit: float, transfer_s_per_token: float, num_requests: int
    ) -> "CurveKey":
        """The largest pool that `instances` can stand for and that `num_requests` bring to a steady state."""
        most = instances
        if kind.role != "prefill":
            most = min(instances, num_requests // (_LIFETIMES * kind.max_batch))
        return cls(kind, max(size for size in POOL_SIZES if size <= max(1, most)), limit, transfer_s_per_token)


@dataclass(frozen=True, slots=True)
class Curve:
    """`rates` ascend, per instance; `shares[i]` of each class meet their target at `rates[i]`. Below the lowest rate
    the shares are the lowest rate's, beyond the highest they are 0."""

    rates: Floats
    shares: npt.NDArray[np.float64]  # [rate, class]

    def at(self, rate: float) -> Shares:
        if len(self.rates) == 0 or rate > self.rates[-1]:
            return np.zeros(self.shares.shape[1])
        return np.array([np.interp(rate, self.rates, column) for column in self.shares.T])


def curve_of(key: CurveKey, *, stream: RequestStream, classes: Sequence[SloClass]) -> Curve:
    """Where the attainment falls, from what it is without load to just below what is asked for; 0 beyond."""
    if key.limit == 0:
        return Curve(np.zeros(0), np.zeros((0, len(classes))))
    asked = np.array([slo.attainment for slo in classes])
    times = StepTimes(key.kind.cost)

    @cache
    def shares_at(step: int) -> Shares:
        return _shares(key, times, stream.scaled_to(_rate(key, step) * key.instances), classes)

    unloaded = shares_at(_LADDER_LENGTH)
    first_good = _first(lambda step: bool(np.all(shares_at(step) >= asked)))
    rates: list[float] = []
    rows: list[Shares] = []
    for step in range(max(0, first_good - 1), _LADDER_LENGTH):
        rows.append(shares_at(step))
        rates.append(_rate(key, step))
        if np.all(rows[-1] >= unloaded - _NEARLY):
            break
    # More load never helps, whatever a few requests say.
    shares = np.minimum.accumulate(np.array(rows[::-1]).reshape(-1, len(classes)))
    return Curve(np.array(rates[::-1]), shares)


def _rate(key: CurveKey, step: int) -> float:
    return float(key.limit * _LADDER_STEP**-step)


def _first(holds: Callable[[int], bool]) -> int:
    """The first step of the ladder that holds, found by bisection; its length if none does."""
    low, high = 0, _LADDER_LENGTH
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _shares(key: CurveKey, times: StepTimes, requests: RequestStream, classes: Sequence[SloClass]) -> Shares:
    """Of each class's requests that meet the targets of the kind's role."""
    met = _targets_met(key, times, requests, classes)
    steady = slice(int(_WARM_UP_SHARE * len(requests)), None)
    met, slo_class = met[steady], requests.slo_class[steady]
    return np.array(
        [met[slo_class == index].mean() if np.any(slo_class == index) else 1.0 for index in range(len(classes))]
    )


def _targets_met(
    key: CurveKey, times: StepTimes, requests: RequestStream, classes: Sequence[SloClass]
) -> npt.NDArray[np.bool_]:
    kind, arrival_s = key.kind, requests.arrival_s
    prompts, outputs = requests.prompt_tokens.tolist(), requests.output_tokens.tolist()
    ttft_target_s = np.array([slo.ttft_s for slo in classes])[requests.slo_class]
    # An answer of one token takes no time after it, and meets the target of 0 that this makes.
    time_target_s = np.array([slo.tpot_s for slo in classes])[requests.slo_class] * (requests.output_tokens - 1)
    met: npt.NDArray[np.bool_]
    if kind.role == "prefill":
        budget = kind.max_batch_tokens
        ttft_s = ttft_alone(times, arrival_s, prompts, instances=key.instances, max_batch_tokens=budget)
        met = ttft_s <= ttft_target_s
    elif kind.role == "decode":
        time_s = decode_time_alone(kind, arrival_s, prompts, outputs, instances=key.instances)
        time_s += np.where(requests.output_tokens > 1, key.transfer_s_per_token * requests.prompt_tokens, 0.0)
        met = time_s <= time_target_s
    else:
        ttft_s, time_s = latencies_colocated(kind, arrival_s, prompts, outputs, instances=key.instances)
        met = (ttft_s <= ttft_target_s) & (time_s <= time_target_s)
    return met

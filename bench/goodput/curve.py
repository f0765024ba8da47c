"""What a curve is made of: attainment at a rate, goodput from the rates, fluidity, and the rate to try next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.stats import binomtest

from bench.load.result import LoadRecord

LEVELS = (0.9, 0.99)  # shares of the requests that must meet both targets
FLUID = 0.9  # a request with this fluidity is fluid
_EVENTS_AFTER_TOKENS = 2  # the usage, and [DONE]
_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class RatePoint:
    """The requests of one rate, as one pair of targets counts them. `interval`: 95 %, binomial (Wilson). `fluid`: the
    share of requests with a fluidity of `FLUID`. Requests that failed or had no end meet nothing."""

    rate: float
    requests: int
    num_met: int
    ttft_met: float
    tpot_met: float
    fluid: float

    @property
    def attainment(self) -> float:
        return self.num_met / self.requests

    @property
    def interval(self) -> tuple[float, float]:
        found = binomtest(self.num_met, self.requests).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)


@dataclass(frozen=True, slots=True)
class Goodput:
    """`rate`: the highest tried rate below every rate that misses the level; 0 if the lowest one misses it.
    `missed_at`: the lowest rate that misses it, None if none does. `surely`: the same two rates where the binomial
    interval, too, is above or below the level."""

    rate: float
    missed_at: float | None
    surely: tuple[float, float | None]


def token_times(event_s: Sequence[float], num_tokens: int) -> list[float]:
    """When each token arrived. A server that is behind puts several tokens into one event, and an event does not tell
    how many: then they are spread evenly over the events. Empty if no event has a token."""
    events = event_s[:-_EVENTS_AFTER_TOKENS]
    if not events:
        return []
    if len(events) >= num_tokens:
        return list(events[:num_tokens])
    return [events[index * len(events) // num_tokens] for index in range(num_tokens)]


def fluidity(token_s: Sequence[float], targets: Targets) -> float:
    """The share of tokens that arrive by their deadlines, as Etalon defines it (arXiv 2407.07000): the time saved on
    earlier tokens is slack for later ones; after a miss there is none. `token_s`: since the request was due. 0 without
    tokens."""
    if not token_s:
        return 0.0
    met, slack_s = 0, 0.0
    for index, (before_s, at_s) in enumerate(pairwise((0.0, *token_s))):
        slack_s += (targets.tpot_s if index else targets.ttft_s) - (at_s - before_s)
        if slack_s >= 0:
            met += 1
        else:
            slack_s = 0.0
    return met / len(token_s)


def is_met(record: LoadRecord, targets: Targets) -> tuple[bool, bool]:
    """(TTFT, TPOT). An answer of one token has no TPOT and meets it."""
    if not record.is_complete:
        return False, False
    ttft_s, tpot_s = record.ttft_s, record.tpot_s
    return ttft_s is not None and ttft_s <= targets.ttft_s, tpot_s is None or tpot_s <= targets.tpot_s


def rate_point(rate: float, records: Sequence[LoadRecord], targets: Targets) -> RatePoint:
    """`records`: at least one."""
    met = [is_met(record, targets) for record in records]
    fluid = 0
    for record in records:
        if record.is_complete:
            since_due_s = [at_s - record.scheduled_s for at_s in record.event_s]
            fluid += fluidity(token_times(since_due_s, record.num_output_tokens), targets) >= FLUID
    return RatePoint(
        rate=rate,
        requests=len(records),
        num_met=sum(map(all, met)),
        ttft_met=sum(ttft for ttft, _ in met) / len(met),
        tpot_met=sum(tpot for _, tpot in met) / len(met),
        fluid=fluid / len(records),
    )


def goodput(points: Sequence[RatePoint], level: float) -> Goodput:
    """Of points in any order. A rate above one that misses does not count, whatever its share is."""
    rate, missed_at = _threshold({point.rate: point.attainment >= level for point in points})
    surely_met, _ = _threshold({point.rate: point.interval[0] >= level for point in points})
    surely_missed = min((point.rate for point in points if point.interval[1] < level), default=None)
    return Goodput(rate, missed_at, (min(surely_met, rate), surely_missed))


def _threshold(met: Mapping[float, bool]) -> tuple[float, float | None]:
    missed_at = min((rate for rate, is_met in met.items() if not is_met), default=None)
    rates = [rate for rate, is_met in met.items() if is_met and (missed_at is None or rate < missed_at)]
    return max(rates, default=0.0), missed_at


def next_rate(points: Sequence[RatePoint], level: float, guess: float, tolerance: float) -> float | None:
    """The rate to try next, by doubling or halving from `guess` and then by bisection (the geometric mean), until the
    bracket's ratio is at most 1 + `tolerance`: then None."""
    if not points:
        return guess
    met, missed_at = _threshold({point.rate: point.attainment >= level for point in points})
    if missed_at is None:
        return met * _FACTOR
    if met == 0.0:
        return missed_at / _FACTOR
    return None if missed_at / met <= 1 + tolerance else float(np.sqrt(met * missed_at))


def tails(records: Sequence[LoadRecord]) -> dict[str, dict[str, float | None]]:
    """Quantiles of TTFT, TPOT and the time between two tokens over complete responses, in seconds; None if there is
    none."""
    complete = [record for record in records if record.is_complete]
    gaps = [
        later - earlier
        for record in complete
        for earlier, later in pairwise(token_times(record.event_s, record.num_output_tokens))
    ]
    values: dict[str, list[float]] = {
        "ttft_s": [record.ttft_s for record in complete if record.ttft_s is not None],
        "tpot_s": [record.tpot_s for record in complete if record.tpot_s is not None],
        "gap_s": gaps,
    }
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: {label: float(np.quantile(of, share)) if of else None for label, share in shares.items()}
        for name, of in values.items()
    }

"""What the last requests say of the cluster: rates, attainment, where time went, and which instances worked together.

Everything is computed from the request log when somebody looks, so that a router whose page nobody has open pays
nothing. All times are in seconds.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from tandem.core.slo import SloClass
from tandem.core.timeline import PARTS, Stage
from tandem.router.records import COMPLETE, RequestRecord

WINDOW_S = 60.0
MAX_RECORDS = 500  # about 5 ms of work
_NUM_BUCKETS = 20
_SHORTEST_WINDOW_S = 1.0
_MAX_FLOWS = 200
ROUTER = "router"

_QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))


@dataclass(slots=True)
class _ClassTotals:
    """`counted` requests had targets and ended by no doing of their client's; `met` of them met all their targets."""

    requests: int = 0
    counted: int = 0
    met: int = 0
    ttfts_s: list[float] = field(default_factory=list)
    tpots_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _FlowTotals:
    requests: int = 0
    transfer_bytes: int = 0
    transfer_s: float = 0.0
    transports: set[str] = field(default_factory=set)


def summarize(
    newest_first: Sequence[RequestRecord], classes: Iterable[SloClass], started_s: float, now_s: float
) -> dict[str, Any]:
    """JSON values about the requests that ended in the last `WINDOW_S`, or, where there were more than `MAX_RECORDS`,
    about that many of the last. The router began at `started_s`.

    `window_s` is the time that they cover. `parts_s` are means of complete requests. `flows` are numbers of attempts
    between two instances, the first of which may be the router. `buckets` divide the window, the oldest first.
    """
    records = list(takewhile(lambda record: _ended_s(record) >= now_s - WINDOW_S, newest_first[:MAX_RECORDS]))
    begin_s = _ended_s(records[-1]) if len(records) == MAX_RECORDS else max(started_s, now_s - WINDOW_S)
    window_s = max(_SHORTEST_WINDOW_S, now_s - begin_s)
    totals: dict[str, _ClassTotals] = {slo.name: _ClassTotals() for slo in classes}
    outcomes: Counter[str] = Counter()
    parts_s: dict[str, float] = {}
    buckets = [[0, 0, 0] for _ in range(_NUM_BUCKETS)]
    num_complete = 0
    for record in records:
        outcomes[record.outcome] += 1
        missed = record.missed_targets
        _add_to_class(totals.setdefault(record.slo.name, _ClassTotals()), record, missed)
        age = (now_s - _ended_s(record)) / window_s
        bucket = buckets[max(0, _NUM_BUCKETS - 1 - int(age * _NUM_BUCKETS))]
        bucket[2 if missed is None else 1 if missed else 0] += 1
        if record.outcome in COMPLETE:
            num_complete += 1
            for name, part_s in record.timeline.parts().items():
                parts_s[name] = parts_s.get(name, 0.0) + part_s
    all_classes = totals.values()
    return {
        "window_s": window_s,
        "requests": len(records),
        "rate": len(records) / window_s,
        "goodput": sum(each.met for each in all_classes) / window_s,
        "counted": sum(each.counted for each in all_classes),
        "met": sum(each.met for each in all_classes),
        "outcomes": dict(outcomes),
        "ttft_s": _quantiles([time_s for each in all_classes for time_s in each.ttfts_s]),
        "tpot_s": _quantiles([time_s for each in all_classes for time_s in each.tpots_s]),
        "parts_s": {name: parts_s[name] / num_complete for _, name in PARTS if name in parts_s},
        "buckets": [{"met": met, "missed": missed, "untargeted": others} for met, missed, others in buckets],
        "classes": [_class_fields(name, each, window_s) for name, each in totals.items()],
        "flows": _flows(records),
    }


def _ended_s(record: RequestRecord) -> float:
    return record.timeline.stamps.get(Stage.FINISHED, record.timeline.stamps[Stage.RECEIVED])


def _add_to_class(totals: _ClassTotals, record: RequestRecord, missed: tuple[str, ...] | None) -> None:
    totals.requests += 1
    if missed is not None:
        totals.counted += 1
        totals.met += not missed
    ttft_s, tpot_s = record.timeline.ttft_s, record.timeline.tpot_s
    if ttft_s is not None:
        totals.ttfts_s.append(ttft_s)
    if tpot_s is not None and record.outcome in COMPLETE:
        totals.tpots_s.append(tpot_s)


def _class_fields(name: str, totals: _ClassTotals, window_s: float) -> dict[str, Any]:
    return {
        "name": name,
        "requests": totals.requests,
        "counted": totals.counted,
        "met": totals.met,
        "goodput": totals.met / window_s,
        "ttft_s": _quantiles(totals.ttfts_s),
        "tpot_s": _quantiles(totals.tpots_s),
    }


def _quantiles(times_s: list[float]) -> dict[str, float] | None:
    """None without a value."""
    times_s.sort()
    if not times_s:
        return None
    return {name: times_s[min(len(times_s) - 1, math.ceil(share * len(times_s)) - 1)] for name, share in _QUANTILES}


def _flows(records: Iterable[RequestRecord]) -> list[dict[str, Any]]:
    """The `_MAX_FLOWS` busiest."""
    flows: defaultdict[tuple[str, str], _FlowTotals] = defaultdict(_FlowTotals)
    for record in records:
        for attempt in record.attempts:
            flows[ROUTER, attempt.prefill_id].requests += 1
            if attempt.decode_id is not None:
                flow = flows[attempt.prefill_id, attempt.decode_id]
                flow.requests += 1
                if attempt.transport is not None:
                    flow.transports.add(attempt.transport)
                    flow.transfer_bytes += attempt.transfer_bytes or 0
                    flow.transfer_s += attempt.transfer_s or 0.0
    busiest = sorted(flows.items(), key=lambda item: (-item[1].requests, item[0]))[:_MAX_FLOWS]
    return [
        {
            "source": source,
            "target": target,
            "requests": flow.requests,
            "transfer_bytes": flow.transfer_bytes,
            "transfer_s": flow.transfer_s,
            "transports": sorted(flow.transports),
        }
        for (source, target), flow in busiest
    ]


def latest_fields(record: RequestRecord, now_s: float) -> dict[str, Any]:
    """JSON values about one request, for a line of a list."""
    return record.fields() | {"ended_ago_s": max(0.0, now_s - _ended_s(record))}

"""What /ui says of the last requests."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.request_slo import NO_SLO, RequestSlo
from tandem.core.slo import SloClass
from tandem.core.timeline import Stage, Timeline
from tandem.router.records import AttemptRecord, RequestRecord
from tandem.router.ui.recent_requests import MAX_RECORDS, WINDOW_S, summarize
from tandem.scheduling.routing import Selection

CHAT = SloClass(name="chat", ttft_s=0.5, tpot_s=0.05)
NOW_S = 1000.0


def make_record(
    ended_ago_s: float = 1.0,
    ttft_s: float = 0.1,
    decode_s: float = 0.9,
    outcome: str = "stop",
    slo: RequestSlo = CHAT.request_slo,
    pair: tuple[str, str | None] = ("p1", "d1"),
) -> RequestRecord:
    """Of 11 output tokens."""
    ended_s = NOW_S - ended_ago_s
    first_s = ended_s - decode_s
    stamps = {
        Stage.RECEIVED: first_s - ttft_s,
        Stage.PREFILL_STARTED: first_s - ttft_s / 2,
        Stage.FIRST_TOKEN: first_s,
        Stage.TRANSFER_COMMITTED: first_s + decode_s / 10,
        Stage.FINISHED: ended_s,
    }
    attempt = AttemptRecord(
        0, pair[0], Selection(pair[0], ()), decode_id=pair[1], transport="gloo", transfer_s=0.01, transfer_bytes=100
    )
    return RequestRecord("r", outcome, None, Timeline(stamps, 5, 0, 11), (attempt,), slo)


records = st.builds(
    make_record,
    ended_ago_s=st.floats(0, 2 * WINDOW_S),
    ttft_s=st.floats(0, 1),
    decode_s=st.floats(0, 2),
    outcome=st.sampled_from(["stop", "length", "unavailable", "cancelled"]),
    slo=st.sampled_from([NO_SLO, CHAT.request_slo]),
)


@given(st.lists(records, max_size=30))
def test_numbers_agree_with_each_other(unordered: list[RequestRecord]) -> None:
    newest_first = sorted(unordered, key=lambda record: -record.timeline.stamps[Stage.FINISHED])
    seen = [r for r in newest_first if NOW_S - r.timeline.stamps[Stage.FINISHED] <= WINDOW_S]
    summary = summarize(newest_first, [CHAT], 0.0, NOW_S)
    assert summary["requests"] == len(seen) == sum(summary["outcomes"].values())
    counted = [record.missed_targets for record in seen if record.missed_targets is not None]
    assert (summary["met"], summary["counted"]) == (counted.count(()), len(counted))
    assert summary["goodput"] == pytest.approx(counted.count(()) / WINDOW_S)
    kinds = [sum(bucket[kind] for bucket in summary["buckets"]) for kind in ("met", "missed", "untargeted")]
    assert kinds == [summary["met"], summary["counted"] - summary["met"], len(seen) - summary["counted"]]
    complete = [record.timeline.total_s for record in seen if record.outcome in ("stop", "length")]
    if complete:
        assert sum(summary["parts_s"].values()) == pytest.approx(statistics.mean(complete), abs=1e-6)
    assert sum(flow["requests"] for flow in summary["flows"] if flow["source"] == "router") == len(seen)


def test_an_idle_router_has_numbers_too() -> None:
    summary = summarize([], [CHAT], 0.0, NOW_S)
    assert (summary["requests"], summary["goodput"], summary["ttft_s"], summary["flows"]) == (0, 0.0, None, [])
    assert [each["name"] for each in summary["classes"]] == ["chat"]


def test_rates_of_a_router_that_has_just_begun() -> None:
    summary = summarize([make_record(), make_record()], [CHAT], NOW_S - 4, NOW_S)
    assert (summary["window_s"], summary["rate"]) == (4.0, 0.5)


def test_many_requests_are_counted_over_the_time_that_they_cover() -> None:
    newest_first = [make_record(ended_ago_s=index / 100) for index in range(2 * MAX_RECORDS)]
    summary = summarize(newest_first, [CHAT], 0.0, NOW_S)
    assert summary["requests"] == MAX_RECORDS
    assert summary["rate"] == pytest.approx(100, rel=0.01)
    assert all(bucket["missed"] > 0 for bucket in summary["buckets"]), "0.09 s a token is too slow"


def test_flows_are_of_pairs_and_of_colocated_instances() -> None:
    summary = summarize([make_record(), make_record(), make_record(pair=("c1", None))], [CHAT], 0.0, NOW_S)
    flows = {(flow["source"], flow["target"]): flow for flow in summary["flows"]}
    assert {pair: flow["requests"] for pair, flow in flows.items()} == {
        ("router", "p1"): 2,
        ("p1", "d1"): 2,
        ("router", "c1"): 1,
    }
    assert flows["p1", "d1"]["transfer_bytes"] == 200
    assert flows["p1", "d1"]["transports"] == ["gloo"]


def test_quantiles_are_of_the_class() -> None:
    fast = [make_record(ttft_s=0.01 * number, slo=CHAT.request_slo) for number in range(1, 101)]
    summary = summarize([*fast, make_record(ttft_s=9.0, slo=NO_SLO)], [CHAT], 0.0, NOW_S)
    chat, best_effort = summary["classes"]
    assert chat["ttft_s"] == pytest.approx({"p50": 0.50, "p90": 0.90, "p99": 0.99})
    assert best_effort["name"] == "none"
    assert best_effort["ttft_s"]["p50"] == pytest.approx(9.0)

"""What `/metrics` says of SLO classes."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from tandem.core.errors import ContextLengthError, OverloadedError
from tandem.core.request_slo import NO_SLO, RequestSlo
from tandem.core.slo import SloClass
from tandem.core.timeline import Stage, Timeline
from tandem.router.metrics import Metrics
from tandem.router.records import RequestLog, RequestRecord
from tandem.router.token_gaps import TokenGaps

CHAT = SloClass(name="chat", ttft_s=0.5, tpot_s=0.05)


def record(slo: RequestSlo, ttft_s: float | None, tpot_s: float = 0.01, outcome: str = "length") -> RequestRecord:
    """Of ten tokens."""
    stamps = {Stage.RECEIVED: 1.0, Stage.FINISHED: 1.0 + (ttft_s or 0.0) + 9 * tpot_s}
    if ttft_s is not None:
        stamps[Stage.FIRST_TOKEN] = 1.0 + ttft_s
    return RequestRecord("r", outcome, None, Timeline(stamps, 5, 0, 10), (), slo)


def read(page: Metrics, slo_class: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(page.render().decode()):
        for sample in family.samples:
            if sample.labels.get("slo_class") == slo_class:
                found[":".join((sample.name, *(v for k, v in sample.labels.items() if k != "slo_class")))] = (
                    sample.value
                )
    return found


@pytest.mark.parametrize(
    ("ended", "requests", "met", "ttft", "tpot"),
    [
        (record(CHAT.request_slo, 0.4), 1, 1, 0, 0),
        (record(CHAT.request_slo, 0.6), 1, 0, 1, 0),
        (record(CHAT.request_slo, 0.4, 0.06), 1, 0, 0, 1),
        (record(CHAT.request_slo, 0.6, 0.06), 1, 0, 1, 1),
        (record(CHAT.request_slo, None, outcome="unavailable"), 1, 0, 1, 1),
        (record(CHAT.request_slo, 0.1, outcome="deadline_exceeded"), 1, 0, 1, 1),
        (record(CHAT.request_slo, 0.6, outcome="cancelled"), 0, 0, 0, 0),
        (record(CHAT.request_slo, None, outcome="context_length_exceeded"), 0, 0, 0, 0),
    ],
)
def test_a_request_counts_once_in_its_class(
    ended: RequestRecord, requests: int, met: int, ttft: int, tpot: int
) -> None:
    page = Metrics([CHAT])
    page.slo.finished(ended)
    found = read(page, "chat")
    assert found["tandem_slo_requests_total"] == requests
    assert found["tandem_slo_met_total"] == met
    assert found["tandem_slo_violations_total:ttft"] == ttft
    assert found["tandem_slo_violations_total:tpot"] == tpot
    assert found["tandem_slo_target_seconds:ttft"] == CHAT.ttft_s
    assert not read(page, "custom")["tandem_slo_requests_total"]


def test_a_request_of_its_own_targets_is_custom_and_misses_only_those() -> None:
    page = Metrics([CHAT])
    page.slo.finished(record(RequestSlo("custom", tpot_s=0.05), 100.0, 0.06))
    page.slo.finished(record(NO_SLO, 100.0))
    found = read(page, "custom")
    assert (found["tandem_slo_requests_total"], found["tandem_slo_violations_total:tpot"]) == (1, 1)
    assert found["tandem_slo_violations_total:ttft"] == 0


def test_a_refusal_for_want_of_room_is_a_miss_and_a_wrong_request_is_not() -> None:
    page = Metrics([CHAT])
    for error in (OverloadedError("full"), ContextLengthError("too long")):
        page.slo.refused(error, record(CHAT.request_slo, None, outcome=error.code))
    page.slo.refused(OverloadedError("full"))
    found = read(page, "chat")
    assert (found["tandem_slo_requests_total"], found["tandem_slo_met_total"]) == (1, 0)


@settings(max_examples=25)
@given(times=st.lists(st.lists(st.floats(0, 20), max_size=20), max_size=3))
def test_gaps_of_all_requests_are_in_one_histogram(times: list[list[float]]) -> None:
    page, gaps = Metrics([CHAT]), []
    for of_request in times:
        ended = record(NO_SLO, 0.1)
        for now_s in sorted(of_request):
            ended.token_gaps.delivered(now_s)
        gaps += [b - a for a, b in zip(sorted(of_request), sorted(of_request)[1:], strict=False)]
        page.slo.finished(ended)
    found = read(page, "none")
    assert found["tandem_token_gap_seconds_count"] == len(gaps)
    assert found["tandem_token_gap_seconds_sum"] == pytest.approx(sum(gaps))
    for bound in ("0.005", "0.25", "10.0"):
        assert found[f"tandem_token_gap_seconds_bucket:{bound}"] == sum(gap <= float(bound) for gap in gaps)


def test_explain_names_class_targets_and_what_became_of_them() -> None:
    log = RequestLog()
    log.finished(record(RequestSlo("chat", 0.5, 0.05), 0.4, 0.06))
    assert "SLO class chat: TTFT 400.0 ms of 500.0 ms, met; TPOT 60.0 ms of 50.0 ms, missed" in log.explain("r")
    log.finished(record(RequestSlo("custom", math.inf, 0.05), 0.4, 0.01))
    assert "SLO class custom: TPOT 10.0 ms of 50.0 ms, met" in log.explain("r")
    log.finished(record(NO_SLO, 0.4))
    assert "SLO" not in log.explain("r")
    assert TokenGaps().longest_s == 0

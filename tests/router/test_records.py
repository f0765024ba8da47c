"""What is kept and written of finished requests."""

import json
import logging

import pytest

from tandem.core.errors import UnavailableError
from tandem.core.timeline import Stage, Timeline
from tandem.router.records import AttemptRecord, RequestLog, RequestRecord
from tandem.scheduling.routing import Candidate, Selection


def make_selection(chosen: str, other: str) -> Selection:
    won = Candidate(chosen, 3.0, (("queued", 1.0), ("prompt", 2.0)), "")
    lost = Candidate(other, 9.0, (("queued", 7.0), ("prompt", 2.0)), "worse by 6")
    return Selection(chosen, (won, lost))


def make_record(request_id: str, outcome: str = "length") -> RequestRecord:
    timeline = Timeline(
        {Stage.RECEIVED: 1.0, Stage.ADMITTED: 1.5, Stage.FIRST_TOKEN: 2.0, Stage.FINISHED: 3.0}, 7, 4, 3
    )
    failed = AttemptRecord(0, "p1", make_selection("p1", "p2"), failure="transfer_failed")
    good = AttemptRecord(1, "p2", make_selection("p2", "p1"), False, "d1", make_selection("d1", "d2"))
    return RequestRecord(request_id, outcome, None, timeline, (failed, good))


def test_one_line_says_all_of_a_request(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tandem.router.records"):
        RequestLog().finished(make_record("r\n1"))
    (line,) = caplog.messages
    assert "\n" not in line, "a client's id must not start a line of its own"
    fields = json.loads(line.removeprefix("request "))
    assert fields["request_id"] == "r\n1"
    assert (fields["outcome"], fields["attempts"], fields["failures"]) == ("length", 2, ["transfer_failed"])
    assert (fields["ttft_s"], fields["tpot_s"], fields["total_s"]) == (1.0, 0.5, 2.0)
    assert fields["instances"] == [["p1", None], ["p2", "d1"]]
    assert sum(fields["parts"].values()) == fields["total_s"]


def test_explains_each_choice_of_each_attempt() -> None:
    log = RequestLog()
    log.finished(make_record("r"))
    lines = log.explain("r").splitlines()
    assert lines[0] == "'r': length, 7 (4 cached) + 3 tokens in 2000.0 ms, TTFT 1000.0 ms, TPOT 500.0 ms, 2 attempts"
    first = lines.index("attempt 1, prefill on p1:")
    parts_ms = [float(line.split()[-2]) for line in lines[1:first]]
    assert sum(parts_ms) == 2000.0
    assert "p2: queued 7 + prompt 2 = 9  worse by 6" in lines[first + 2]
    assert "attempt 1 failed: transfer_failed" in lines
    assert "attempt 2, decode on d1:" in lines
    assert log.explain("never seen") == ""


def test_remembers_only_the_last() -> None:
    log = RequestLog(capacity=3)
    for i in range(10):
        log.finished(make_record(f"r{i}"))
    log.finished(make_record("r8", outcome="stop"))
    assert [log.find(f"r{i}") is not None for i in range(10)] == [False] * 7 + [True] * 3
    assert [record.request_id for record in log.latest(2)] == ["r8", "r9"]
    again = log.find("r8")
    assert again is not None
    assert again.outcome == "stop"


def test_refusal_is_written(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tandem.router.records"):
        RequestLog().refused(UnavailableError("no decode worker is ready"))
    assert caplog.messages == ["request refused: unavailable: no decode worker is ready"]

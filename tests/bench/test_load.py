"""The load generator against servers that stall, refuse, lie and disappear."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import orjson
import pytest

from bench.load.__main__ import main, served_model
from bench.load.requests import make_streams, prompts_of
from bench.load.result import GeneratorHealth, LoadResult
from bench.load.run import run_load
from tandem.core.config_file import dump_config
from tandem.core.errors import ConfigError
from tandem.core.slo_file import SloFile
from tandem.core.timeline import Stage
from tandem.placement.workload.requests import RequestStream
from tandem.profiling.completion_client import CompletionClient, ServerGoneError
from tandem.profiling.errors import MeasurementError

Reply = Callable[[dict[str, object], asyncio.StreamWriter], Awaitable[None]]
TIMELINE = {"ttft_s": 0.03, "stages": {"received": 0.0, "prefill_started": 0.01, "first_token": 0.03, "finished": 0.04}}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def piece(body: bytes) -> bytes:
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"


def event(value: dict[str, object]) -> bytes:
    return piece(b"data: " + orjson.dumps(value) + b"\n\n")


def ending(prompt_tokens: int, completion_tokens: int) -> bytes:
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "tandem": {"timeline": TIMELINE},
    }
    return event({"choices": [], "usage": usage}) + piece(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def body_of(asked: dict[str, object]) -> tuple[list[int], int]:
    prompt, max_tokens = asked["prompt"], asked["max_tokens"]
    assert isinstance(prompt, list)
    assert isinstance(max_tokens, int)
    return prompt, max_tokens


@asynccontextmanager
async def serving(reply: Reply) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """A server that reads each request and calls `reply`; yields (its URL, a function that makes it disappear)."""
    writers: set[asyncio.StreamWriter] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reply(orjson.loads(await reader.readexactly(length)), writer)

    def disappear() -> None:
        server.close()
        for writer in writers:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", disappear
    finally:
        disappear()


async def complete_response(asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
    prompt, max_tokens = body_of(asked)
    writer.write(HEAD + event({"choices": [{"text": "a"}]}) + ending(len(prompt), max_tokens))
    await writer.drain()


async def no_response(asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
    pass


def requests(count: int, gap_s: float) -> RequestStream:
    return RequestStream.make(
        np.arange(count) * gap_s, np.full(count, 5, dtype=np.int64), np.full(count, 3, dtype=np.int64)
    )


async def load(url: str, stream: RequestStream, **options: object) -> LoadResult:
    client = CompletionClient(url)
    try:
        return await run_load(client, stream, "m", **options)  # type: ignore[arg-type]
    finally:
        client.close()


async def test_a_stalled_server_gets_every_request_at_its_time_and_all_the_waiting_counts() -> None:
    resumes_s = time.monotonic() + 0.6

    async def stalled(asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(max(0.0, resumes_s - time.monotonic()))
        await complete_response(asked, writer)

    async with serving(stalled) as (url, _):
        began_s = time.monotonic()
        result = await load(url, requests(20, 0.02))
    stalls_s = resumes_s - began_s
    assert all(record.is_complete for record in result.records)
    assert result.health.peak_in_flight == 20, "no request waits for another one's response"
    for record in result.records:
        assert record.sent_s is not None
        assert record.ttft_s is not None
        assert 0 <= record.sent_s - record.scheduled_s < 0.2
        assert record.ttft_s >= stalls_s - record.scheduled_s - 0.05


async def test_a_record_has_the_times_of_its_first_and_last_event_and_the_servers_timeline() -> None:
    async def slow(asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
        prompt, max_tokens = body_of(asked)
        writer.write(HEAD)
        await asyncio.sleep(0.05)
        writer.write(event({"choices": [{"text": "a"}]}))
        await asyncio.sleep(0.2)
        writer.write(ending(len(prompt), max_tokens))

    async with serving(slow) as (url, _):
        result = await load(url, requests(2, 0.01))
    for record in result.records:
        assert record.ttft_s is not None
        assert record.tpot_s is not None
        assert record.ttft_s >= 0.05
        assert 0.1 <= record.tpot_s < 0.2, "0.2 s over the two tokens after the first"
        assert record.timeline == TIMELINE
    simulated = result.as_simulation()
    starts_s = simulated.stage(Stage.FIRST_TOKEN) - simulated.stage(Stage.PREFILL_STARTED)
    assert starts_s.tolist() == pytest.approx([0.02, 0.02]), "a server's stage, on the client's clock"
    assert simulated.ttft_s.tolist() == [record.ttft_s for record in result.records]
    assert simulated.tpot_s.tolist() == pytest.approx([record.tpot_s for record in result.records])


async def test_lengths_are_requested_exactly_and_a_response_of_another_length_is_an_error() -> None:
    seen: list[tuple[int, int]] = []

    async def short(asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
        prompt, max_tokens = body_of(asked)
        seen.append((len(prompt), max_tokens))
        writer.write(HEAD + ending(len(prompt), max_tokens - len(seen) + 1))

    async with serving(short) as (url, _):
        result = await load(url, requests(2, 0.05))
    assert seen == [(5, 3), (5, 3)]
    assert result.records[0].error is None
    assert result.records[1].error == "usage has 5 + 2 tokens instead of 5 + 3"
    assert not result.as_simulation().finished[1]


async def test_a_refusal_has_the_servers_message() -> None:
    async def refuse(asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
        body = orjson.dumps({"error": {"message": "The queue is full; try again later."}})
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    async with serving(refuse) as (url, _):
        result = await load(url, requests(3, 0.0))
    assert {record.error for record in result.records} == {"status 429: The queue is full; try again later."}
    assert all(record.ttft_s is None for record in result.records)


async def test_an_error_in_a_stream_and_a_connection_cut_short_are_errors_of_their_requests() -> None:
    async def fail(asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
        if body_of(asked)[1] == 3:
            writer.write(HEAD + event({"error": {"message": "The worker is gone."}}) + piece(b"data: [DONE]\n\n"))
            writer.write(b"0\r\n\r\n")
        else:
            writer.write(HEAD + event({"choices": [{"text": "a"}]}))
            writer.close()

    stream = RequestStream.make(np.array([0.0, 0.0]), np.array([5, 5]), np.array([3, 4]))
    async with serving(fail) as (url, _):
        result = await load(url, stream)
    assert result.records[0].error == "The worker is gone."
    assert result.records[1].error is not None
    assert "closed the connection" in result.records[1].error
    assert result.stopped is None


async def test_a_late_response_is_abandoned() -> None:
    async with serving(no_response) as (url, _):
        result = await load(url, requests(1, 0.0), timeout_s=0.1)
    assert result.records[0].error == "no complete response after 0.1 s"


async def test_a_cancelled_request_leaves_no_connection_in_use() -> None:
    async with serving(no_response) as (url, _):
        client = CompletionClient(url)
        request = client.make_request("m", [1, 2, 3], 2)
        asking = asyncio.create_task(client.complete(request, 60))
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        again = await client.complete(request, 0.05)
        client.close()
    assert again.error == "no complete response after 0.05 s"


async def test_a_server_that_goes_away_ends_the_run_and_its_responses_are_kept() -> None:
    num_answered = 0

    async def three(asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
        nonlocal num_answered
        await complete_response(asked, writer)
        num_answered += 1
        if num_answered == 3:
            disappear()

    async with serving(three) as (url, disappear):
        result = await load(url, requests(200, 0.02))
    assert result.stopped is not None
    assert "nothing answers at http://127.0.0.1" in result.stopped
    assert result.records[0].is_complete
    assert result.records[-1].sent_s is None
    assert result.duration_s < 3


async def test_without_a_server_the_run_does_not_begin() -> None:
    with pytest.raises(ServerGoneError, match=r"nothing answers at http://127\.0\.0\.1:1"):
        await load("http://127.0.0.1:1", requests(1, 0.0))
    with pytest.raises(MeasurementError, match="nothing answers"):
        served_model("http://127.0.0.1:1")
    with pytest.raises(MeasurementError, match="http://host:port"):
        CompletionClient("localhost:8000")


async def test_stop_ends_a_run_at_once() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, stop.set)
    async with serving(no_response) as (url, _):
        result = await load(url, requests(100, 0.05), stop=stop)
    assert result.stopped == "interrupted"
    assert result.duration_s < 1
    assert not any(record.is_complete for record in result.records)


SLO = SloFile.model_validate(
    {
        "model": "m",
        "cluster": {"nodes": [{"device": "cpu"}]},
        "slo": [{"ttft_s": 1, "tpot_s": 0.1}],
        "workload": {"dataset": "sharegpt"},
    }
)


def test_rates_stretch_the_same_requests() -> None:
    (first, slow), (second, fast) = make_streams(SLO, None, (2.0, 8.0), 50, seed=3)
    assert (first, second) == (2.0, 8.0)
    assert slow.arrival_s.tolist() == pytest.approx((4 * fast.arrival_s).tolist())
    assert slow.prompt_tokens.tolist() == fast.prompt_tokens.tolist()
    with pytest.raises(ConfigError, match="--rates"):
        make_streams(SLO, None, (), 50, seed=3)


def test_a_trace_is_replayed_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,20,6\n4,30,7\n")
    ((rate, stream),) = make_streams(SLO, path, (), 10, seed=0)
    assert rate == pytest.approx(0.5)
    assert stream.arrival_s.tolist() == pytest.approx([0, 1, 4])
    assert stream.output_tokens.tolist() == [5, 6, 7]


def test_without_a_server_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "slo.yaml"
    path.write_text(dump_config(SLO))
    assert main(["--url", "http://127.0.0.1:1", "--slo", str(path), "--rates", "1"]) == 1
    assert "nothing answers at http://127.0.0.1:1" in capsys.readouterr().err
    assert main(["--slo", str(tmp_path / "none.yaml")]) == 2


def test_prompts_share_what_their_group_shares_and_nothing_else() -> None:
    stream = RequestStream.make(
        np.zeros(4),
        np.array([40, 50, 30, 30]),
        np.ones(4, dtype=np.int64),
        prefix_group=np.array([0, 0, 1, -1]),
        prefix_tokens=np.array([20, 32, 16, 0]),
    )
    first, second, other, alone = prompts = prompts_of(stream, seed=7)
    assert [len(prompt) for prompt in prompts] == [40, 50, 30, 30]
    assert first[:20] == second[:20]
    assert first[20:32] != second[20:32]
    assert other[:16] != first[:16]
    assert alone[:16] not in (first[:16], other[:16])
    assert prompts_of(stream, seed=7) == prompts
    assert prompts_of(stream, seed=8) != prompts


@pytest.mark.parametrize(
    ("lags_s", "cpu_share", "fault"),
    [([0.001] * 100, 0.1, None), ([0.001] * 90 + [0.5] * 10, 0.1, "late"), ([0.001] * 100, 0.95, "bottleneck")],
)
def test_a_run_that_the_generator_distorted_is_marked(lags_s: list[float], cpu_share: float, fault: str | None) -> None:
    health = GeneratorHealth(np.array(lags_s), np.array([0.001]), cpu_share, 1)
    found = health.fault(max_lag_s=0.02)
    assert found is None if fault is None else found is not None and fault in found

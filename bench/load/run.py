"""One open-loop run: every request is sent at its scheduled time, whether or not earlier ones have completed.

A closed loop, or a pool of clients that waits for responses, sends less while the server is slow, and so leaves out the
requests that would have waited longest (coordinated omission). Here arrivals are fixed beforehand and latency counts
from the scheduled time, so delays of the generator itself are included; they are also reported separately.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from bench.load.requests import prompts_of
from bench.load.result import GeneratorHealth, LoadRecord, LoadResult
from tandem.placement.workload.requests import RequestStream
from tandem.profiling.completion_client import CompletionClient, ServerGoneError, TimedCompletion

_TICK_S = 0.01
_CONNECTIONS_FIRST = 8


@dataclass(slots=True)
class _LoadRun:
    """The state of a run in progress; it belongs to the event loop."""

    client: CompletionClient
    timeout_s: float
    began_s: float
    records: list[LoadRecord]
    on_done: Callable[[LoadRecord], None]
    send_lag_s: list[float] = field(default_factory=list)
    loop_lag_s: list[float] = field(default_factory=list)
    num_in_flight: int = 0
    peak_in_flight: int = 0
    server_gone: str | None = None

    async def send_all(self, requests: Sequence[bytes]) -> None:
        """Returns when every response is complete, or the server is gone."""
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(requests):
                due_s = self.began_s + self.records[index].scheduled_s
                while (wait_s := due_s - time.monotonic()) > 0:  # noqa: ASYNC110 - a timer may fire a little early
                    await asyncio.sleep(wait_s)
                if self.server_gone is not None:
                    break
                group.create_task(self._send(index, request, due_s))

    async def _send(self, index: int, request: bytes, due_s: float) -> None:
        self.num_in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.num_in_flight)
        try:
            timed = await self.client.complete(request, self.timeout_s)
        except ServerGoneError as error:
            self.server_gone = str(error)
            self.records[index] = replace(self.records[index], error=str(error))
            return
        finally:
            self.num_in_flight -= 1
        self.send_lag_s.append(timed.sent_s - due_s)
        self.records[index] = _completed(self.records[index], timed, self.began_s)
        self.on_done(self.records[index])

    async def tick(self) -> None:
        """Records how late this event loop runs what is due."""
        while True:
            due_s = time.monotonic() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self.loop_lag_s.append(max(0.0, time.monotonic() - due_s))


def _completed(record: LoadRecord, timed: TimedCompletion, began_s: float) -> LoadRecord:
    error, usage = timed.error, timed.usage
    timeline: dict[str, object] | None = None
    num_cached_tokens = 0
    if usage is not None:
        expected = (record.num_prompt_tokens, record.num_output_tokens)
        if (actual := (usage.get("prompt_tokens"), usage.get("completion_tokens"))) != expected:
            error = f"usage has {actual[0]} + {actual[1]} tokens instead of {expected[0]} + {expected[1]}"
        details = usage.get("prompt_tokens_details")
        num_cached_tokens = details.get("cached_tokens", 0) if isinstance(details, dict) else 0
        extra = usage.get("tandem")
        if isinstance(extra, dict):
            timeline = extra.get("timeline")
    return replace(
        record,
        sent_s=timed.sent_s - began_s,
        first_s=None if timed.first_s is None else timed.first_s - began_s,
        last_s=timed.last_s - began_s,
        error=error,
        timeline=timeline,
        num_cached_tokens=num_cached_tokens,
        event_s=tuple(at_s - began_s for at_s in timed.event_s),
    )


async def run_load(
    client: CompletionClient,
    stream: RequestStream,
    model: str,
    *,
    prompt_seed: int | None = None,
    timeout_s: float = 600.0,
    with_timelines: bool = False,
    stop: asyncio.Event | None = None,
    on_done: Callable[[LoadRecord], None] = lambda record: None,
) -> LoadResult:
    """Send the whole stream, the first request now. `stop` ends the run and abandons the requests in flight.

    Raises ServerGoneError if there is no server at the beginning; if it goes later, the run ends with
    `LoadResult.stopped`.
    """
    rows = zip(stream.prompt_tokens.tolist(), stream.output_tokens.tolist(), stream.slo_class.tolist(), strict=True)
    due = (stream.arrival_s - stream.arrival_s[:1]).tolist()
    records = [LoadRecord(i, due[i], *row) for i, row in enumerate(rows)]
    requests = [
        client.make_request(model, prompt, record.num_output_tokens, with_timeline=with_timelines)
        for prompt, record in zip(prompts_of(stream, prompt_seed), records, strict=True)
    ]
    await client.open(min(_CONNECTIONS_FIRST, len(stream)))
    began_s, cpu_before_s = time.monotonic(), time.process_time()
    run = _LoadRun(client, timeout_s, began_s, records, on_done)
    sending = asyncio.create_task(run.send_all(requests), name="send")
    helpers: list[asyncio.Task[object]] = [asyncio.create_task(run.tick(), name="tick")]
    if stop is not None:
        helpers.append(asyncio.create_task(stop.wait(), name="stop"))
    await asyncio.wait({sending, *helpers}, return_when=asyncio.FIRST_COMPLETED)
    duration_s, cpu_s = time.monotonic() - began_s, time.process_time() - cpu_before_s
    for task in (sending, *helpers):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    stopped = run.server_gone
    if stop is not None and stop.is_set():
        stopped = "interrupted"
    health = GeneratorHealth(
        np.array(run.send_lag_s), np.array(run.loop_lag_s), cpu_s / max(duration_s, 1e-9), run.peak_in_flight
    )
    return LoadResult(stream, tuple(records), health, duration_s, stopped)

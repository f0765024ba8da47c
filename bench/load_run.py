"""One open-loop run: every request is sent at its time, whatever has become of the others.

A closed loop, or a pool of clients that waits for answers, sends less when the server is slow, and so leaves out the
very requests that would have waited longest (coordinated omission). Here arrivals are fixed beforehand and latency
counts from the scheduled time, so that what the generator itself loses is in the figures too, and is reported beside
them.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from bench.load_client import LoadClient, ServerGoneError, Stamped
from bench.load_result import GeneratorHealth, LoadRecord, LoadResult
from tandem.placement.workload.requests import RequestStream

FIRST_ID, LAST_ID = 300, 1000  # ids of prompts: plain tokens of every vocabulary of more than a thousand
_TICK_S = 0.01
_OPEN_FIRST = 8  # connections


def prompts_of(stream: RequestStream, seed: int | None) -> list[list[int]]:
    """Token ids of every prompt: random, but for what a request shares with its group. Without a seed they are new each
    time, so that no server knows them from an earlier run."""
    draw = np.random.default_rng(seed)
    longest = {int(group): 0 for group in np.unique(stream.prefix_group) if group >= 0}
    for group, length in zip(stream.prefix_group.tolist(), stream.prefix_tokens.tolist(), strict=True):
        if group >= 0:
            longest[group] = max(longest[group], length)
    shared = {group: draw.integers(FIRST_ID, LAST_ID, length).tolist() for group, length in longest.items()}
    prompts = []
    rows = (stream.prompt_tokens.tolist(), stream.prefix_group.tolist(), stream.prefix_tokens.tolist())
    for length, group, num_shared in zip(*rows, strict=True):
        head = shared[group][:num_shared] if group >= 0 else []
        prompts.append(head + draw.integers(FIRST_ID, LAST_ID, length - len(head)).tolist())
    return prompts


@dataclass(slots=True)
class _Run:
    """The state of a run under way; all of it belongs to its event loop."""

    client: LoadClient
    timeout_s: float
    began_s: float
    records: list[LoadRecord]
    on_done: Callable[[LoadRecord], None]
    send_lag_s: list[float] = field(default_factory=list)
    loop_lag_s: list[float] = field(default_factory=list)
    gone: str | None = None

    async def send_all(self, requests: Sequence[bytes]) -> None:
        """Returns when every answer is whole, or the server is gone."""
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(requests):
                due_s = self.began_s + self.records[index].scheduled_s
                while (wait_s := due_s - time.monotonic()) > 0:  # noqa: ASYNC110 - a timer may fire a little early
                    await asyncio.sleep(wait_s)
                if self.gone is not None:
                    break
                group.create_task(self._ask(index, request, due_s))

    async def _ask(self, index: int, request: bytes, due_s: float) -> None:
        try:
            stamped = await self.client.ask(request, self.timeout_s)
        except ServerGoneError as error:
            self.gone = str(error)
            self.records[index] = replace(self.records[index], error=str(error))
            return
        self.send_lag_s.append(stamped.sent_s - due_s)
        self.records[index] = _completed(self.records[index], stamped, self.began_s)
        self.on_done(self.records[index])

    async def tick(self) -> None:
        """A clock that shows how late this event loop does what is due."""
        while True:
            due_s = time.monotonic() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self.loop_lag_s.append(max(0.0, time.monotonic() - due_s))


def _completed(record: LoadRecord, stamped: Stamped, began_s: float) -> LoadRecord:
    error, usage = stamped.error, stamped.usage
    timeline: dict[str, object] | None = None
    if usage is not None:
        asked = (record.num_prompt_tokens, record.num_output_tokens)
        if (got := (usage.get("prompt_tokens"), usage.get("completion_tokens"))) != asked:
            error = f"the answer is of {got[0]} and {got[1]} tokens instead of {asked[0]} and {asked[1]}"
        extra = usage.get("tandem")
        if isinstance(extra, dict):
            timeline = extra.get("timeline")
    return replace(
        record,
        sent_s=stamped.sent_s - began_s,
        first_s=None if stamped.first_s is None else stamped.first_s - began_s,
        last_s=stamped.last_s - began_s,
        error=error,
        timeline=timeline,
    )


async def run_load(
    client: LoadClient,
    stream: RequestStream,
    model: str,
    *,
    prompt_seed: int | None = None,
    timeout_s: float = 600.0,
    with_timelines: bool = False,
    stop: asyncio.Event | None = None,
    on_done: Callable[[LoadRecord], None] = lambda record: None,
) -> LoadResult:
    """Send the whole stream, the first request now. `stop` ends the run; what was under way is given up.

    Raises ServerGoneError if there is no server at the beginning; one that goes later ends the run, see
    `LoadResult.stopped`.
    """
    rows = zip(stream.prompt_tokens.tolist(), stream.output_tokens.tolist(), stream.slo_class.tolist(), strict=True)
    due = (stream.arrival_s - stream.arrival_s[:1]).tolist()
    records = [LoadRecord(i, due[i], *row) for i, row in enumerate(rows)]
    requests = [
        client.completion_request(model, prompt, record.num_output_tokens, with_timeline=with_timelines)
        for prompt, record in zip(prompts_of(stream, prompt_seed), records, strict=True)
    ]
    await client.open(min(_OPEN_FIRST, len(stream)))
    began_s, cpu_before_s = time.monotonic(), time.process_time()
    run = _Run(client, timeout_s, began_s, records, on_done)
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
    stopped = run.gone
    if stop is not None and stop.is_set():
        stopped = "interrupted"
    health = GeneratorHealth(
        np.array(run.send_lag_s), np.array(run.loop_lag_s), cpu_s / max(duration_s, 1e-9), client.peak_busy
    )
    return LoadResult(stream, tuple(records), health, duration_s, stopped)

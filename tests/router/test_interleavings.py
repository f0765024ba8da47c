"""Whatever the order of events, losses and reads: tokens are neither lost, nor repeated, nor changed."""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.clock import SystemClock
from tandem.core.errors import TandemError, UnavailableError
from tandem.core.request import FinishReason, GenerationRequest, SamplingParams
from tandem.core.session import (
    Cancel,
    KvReserved,
    NewTokens,
    PrefillStarted,
    RequestFailed,
    Role,
    SessionCommand,
    SessionEvent,
    TokenFrame,
    TransferCommitted,
)
from tandem.router.running import RunningRequest
from tandem.scheduling.routing_settings import RoutingSettings
from tests.router.fakes import Cluster, expected_tokens, finished_event, make_cluster, make_status, next_tokens

INSTANCES = (
    ("p1", Role.PREFILL),
    ("p2", Role.PREFILL),
    ("d1", Role.DECODE),
    ("d2", Role.DECODE),
    ("c1", Role.COLOCATED),
)


@dataclass
class RuleWorker:
    """Answers each command with all of its events at once; they wait in `events` until the test delivers them.

    Cancelled requests go on sending: the worst a real worker could do.
    """

    events: deque[SessionEvent] = field(default_factory=deque)
    opened: set[int] = field(default_factory=set)

    def send(self, command: SessionCommand) -> None:
        if isinstance(command, Cancel):
            return
        handle, request = command.handle, command.request
        self.opened.add(handle)
        if command.kv is None:
            self.events += (PrefillStarted(handle, 0), finished_event(handle, request))
        else:
            self.events += (KvReserved(handle), TransferCommitted(handle, 0.001, 1, "gloo"))
        if command.hand_over:
            return
        count = request.sampling.max_tokens - request.num_output_tokens - 1
        for skip in range(1, count + 1):
            last = FinishReason.LENGTH if skip == count else None
            self.events.append(TokenFrame((NewTokens(handle, next_tokens(request, 1, skip), last),)))


@dataclass
class Run:
    cluster: Cluster
    workers: dict[str, RuleWorker]
    running: list[RunningRequest]
    received: dict[str, list[int]]
    ends: dict[str, FinishReason | TandemError]

    async def step(self, kind: str, where: int, times: int) -> None:
        instance_id = INSTANCES[where % len(INSTANCES)][0]
        worker, fleet = self.workers[instance_id], self.cluster.fleet
        registration = fleet._registered[instance_id]
        if kind == "deliver":
            for _ in range(min(times, len(worker.events))):
                self.cluster.dispatcher.on_event(instance_id, worker.events.popleft())
        elif kind == "fail" and worker.opened:
            handle = max(worker.opened)
            worker.events.appendleft(RequestFailed(handle, "transfer_failed", "torn"))
        elif kind == "restart":
            fleet._disconnect(registration, registration.session)
            self.workers[instance_id] = fresh = RuleWorker()
            fleet._connect(registration, fresh)  # type: ignore[arg-type]
        elif kind == "read":
            await self.read(self.running[where % len(self.running)])
        await asyncio.sleep(0)

    async def read(self, running: RunningRequest) -> None:
        """Take what is there, without waiting for more."""
        request_id = running.request.request_id
        if request_id in self.ends:
            return
        task = asyncio.ensure_future(anext(running))
        await asyncio.sleep(0)
        if not task.done():
            task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(result, tuple):
            self.received[request_id].extend(token.token_id for token in result)
        elif isinstance(result, TandemError):
            self.ends[request_id] = result
        elif isinstance(result, StopAsyncIteration):
            assert running.finish_reason is not None
            self.ends[request_id] = running.finish_reason


steps = st.tuples(
    st.sampled_from(["deliver"] * 6 + ["read", "read", "fail", "restart"]),
    st.integers(0, 4),
    st.sampled_from([1, 1, 2, 8]),
)


@settings(max_examples=150, deadline=None)
@given(script=st.lists(steps, min_size=8, max_size=60), max_tokens=st.integers(1, 6), num_requests=st.integers(1, 3))
def test_no_interleaving_loses_repeats_or_changes_a_token(
    script: list[tuple[str, int, int]], max_tokens: int, num_requests: int
) -> None:
    asyncio.run(_run_script(script, max_tokens, num_requests))


async def _run_script(script: list[tuple[str, int, int]], max_tokens: int, num_requests: int) -> None:
    cluster = make_cluster(RoutingSettings(max_attempts=4, replacement_wait_s=5.0, retry_pause_s=0.0))
    workers = {instance_id: RuleWorker() for instance_id, _ in INSTANCES}
    for instance_id, role in INSTANCES:
        cluster.report(make_status(instance_id, role))
        cluster.fleet._connect(cluster.fleet._registered[instance_id], workers[instance_id])  # type: ignore[arg-type]
    requests = [
        GenerationRequest(f"r{i}", (i, 2, 3), SamplingParams(max_tokens=max_tokens)) for i in range(num_requests)
    ]
    running = [cluster.dispatcher.start(request, SystemClock().now_s()) for request in requests]
    run = Run(cluster, workers, running, {request.request_id: [] for request in requests}, {})

    for kind, where, times in script:
        await run.step(kind, where, times)
    async with asyncio.timeout(10):
        while len(run.ends) < num_requests:  # the faults are over: everything must come to its end
            for where in range(len(INSTANCES)):
                await run.step("deliver", where, 100)
            for each in running:
                await run.read(each)

    for request in requests:
        received, end = run.received[request.request_id], run.ends[request.request_id]
        assert received == expected_tokens(request)[: len(received)]
        if isinstance(end, FinishReason):
            assert received == expected_tokens(request)
        else:
            assert isinstance(end, UnavailableError)
    assert sorted(record.request_id for record in cluster.records) == [request.request_id for request in requests]
    for record in cluster.records:
        assert abs(sum(record.timeline.parts().values()) - record.timeline.total_s) < 1e-9
    for instance in cluster.fleet.instances:
        assert (instance.open_requests, instance.uncomputed_tokens, instance.held_tokens) == (0, 0, 0)

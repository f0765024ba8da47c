"""The live router on virtual time, in front of instances that follow a random script; everything is written down."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from tandem.core.errors import InvalidRequestError, TandemError
from tandem.core.request import FinishReason, GenerationRequest, SamplingParams
from tandem.core.session import (
    InstanceStatus,
    KvReserved,
    NewTokens,
    PrefillStarted,
    RequestFailed,
    SessionCommand,
    SessionEvent,
    Submit,
    TokenFrame,
    TransferCommitted,
)
from tandem.core.step_coefficients import StepCoefficients
from tandem.router.dispatch import Dispatcher
from tandem.router.running import RunningRequest
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing import Selection
from tandem.scheduling.routing_settings import RoutingSettings
from tests.conformance.virtual_time import LoopClock
from tests.router.fakes import MODEL, ROLES, FakeSession, expected_tokens, finished_event, make_status, next_tokens

BLOCK_SIZE = 16
STEP_COST = StepCoefficients(0.01, 1e-3, 1e-3, 1e-3, 1e-5, 1e-6)


@dataclass(frozen=True)
class Ask:
    """A request of `prefix_blocks` blocks that its group shares, and less than a block of its own."""

    at_s: float
    group: int
    prefix_blocks: int
    own_tokens: int
    output_tokens: int
    cancel_after_s: float | None

    @property
    def prompt_tokens(self) -> int:
        return self.prefix_blocks * BLOCK_SIZE + self.own_tokens

    def request(self, row: int) -> GenerationRequest:
        prompt = (1000 + self.group,) * (self.prefix_blocks * BLOCK_SIZE) + (row,) * self.own_tokens
        return GenerationRequest(str(row), prompt, SamplingParams(temperature=0.0, max_tokens=self.output_tokens))


@dataclass(frozen=True)
class Trouble:
    """`kind`: the instance's session breaks, the instance goes and comes back, drains, or takes another role."""

    at_s: float
    kind: str
    instance_id: str
    lasts_s: float


@dataclass
class Recording:
    """`events` come from outside, or from the timer: (time, what, its arguments). `decisions` are the calls of the
    driver, without the text."""

    events: list[tuple[float, str, Any]] = field(default_factory=list)
    decisions: list[tuple[Any, ...]] = field(default_factory=list)
    num_refused: int = 0


class RecordingDispatcher(Dispatcher):
    recording: Recording

    def on_event(self, instance_id: str, event: SessionEvent) -> None:
        self.recording.events.append((self._clock.now_s(), "event", (instance_id, event)))
        super().on_event(instance_id, event)

    def _on_timer(self, time_s: float) -> None:
        self.recording.events.append((max(time_s, self._clock.now_s()), "wake", None))
        super()._on_timer(time_s)

    def submit(self, attempt: Attempt, instance_id: str, source_id: str | None, selection: Selection | None) -> None:
        self.recording.decisions.append(submitted(self._clock.now_s(), attempt, instance_id, source_id))
        super().submit(attempt, instance_id, source_id, selection)

    def cancel(self, attempt: Attempt, instance_id: str) -> None:
        self.recording.decisions.append((self._clock.now_s(), "cancel", attempt.handle, instance_id))
        super().cancel(attempt, instance_id)

    def end(self, request: RoutedRequest, error: TandemError | None) -> None:
        self.recording.decisions.append(ended(self._clock.now_s(), request, error))
        super().end(request, error)

    def give_up(self, running: RunningRequest, end: FinishReason | TandemError) -> None:
        self.recording.events.append((self._clock.now_s(), "cancel", int(running.request.request_id)))
        super().give_up(running, end)


def submitted(now_s: float, attempt: Attempt, instance_id: str, source_id: str | None) -> tuple[Any, ...]:
    request = attempt.request
    where = (instance_id, source_id, attempt.hand_over)
    return (now_s, "submit", int(str(request.key)), attempt.handle, request.num_attempts, attempt.num_tokens, *where)


def ended(now_s: float, request: RoutedRequest, error: TandemError | None) -> tuple[Any, ...]:
    return (now_s, "end", int(str(request.key)), None if error is None else (error.code, error.message))


class ScriptedSession(FakeSession):
    """Answers each command after random times, fails some, and goes on with some of those that were cancelled."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random
        self._cancelled: set[int] = set()

    def send(self, command: SessionCommand) -> None:
        super().send(command)
        random, handle = self._random, command.handle
        if not isinstance(command, Submit):
            if random.random() < 0.6:
                self._cancelled.add(handle)
            return
        after_s = random.uniform(0.001, 0.02)
        if random.random() < 0.08:
            code = random.choice(["overloaded", "unavailable", "incompatible_peer", "invalid_request"])
            self._later(after_s, RequestFailed(handle, code, "scripted"))
            return
        if command.kv is None:
            self._later(after_s, PrefillStarted(handle, 0))
            after_s += random.expovariate(10.0)
            if random.random() < 0.05:
                self._later(after_s, RequestFailed(handle, "unavailable", "out of memory"))
                return
            self._later(after_s, finished_event(handle, command.request))
            if command.hand_over:
                return
        else:
            self._later(after_s, KvReserved(handle))
            after_s += random.expovariate(10.0)
            if random.random() < 0.15:
                self._later(after_s, RequestFailed(handle, "transfer_failed", "torn"))
                return
            self._later(after_s, TransferCommitted(handle, 0.001, 1, "gloo"))
        self._generate(command, after_s)

    def _generate(self, command: Submit, after_s: float) -> None:
        request, handle, random = command.request, command.handle, self._random
        left, skip = request.sampling.max_tokens - request.num_output_tokens - 1, 1
        while left > 0:
            after_s += random.expovariate(30.0)
            if random.random() < 0.05:
                self._later(after_s, RequestFailed(handle, "unavailable", "out of memory"))
                return
            count = random.randint(1, left)
            left -= count
            reason = None if left else FinishReason.LENGTH
            self._later(after_s, TokenFrame((NewTokens(handle, next_tokens(request, count, skip), reason),)))
            skip += count

    def _later(self, after_s: float, event: Any) -> None:
        asyncio.get_running_loop().call_later(after_s, self._push_unless_cancelled, event)

    def _push_unless_cancelled(self, event: Any) -> None:
        handle = event.items[0].handle if isinstance(event, TokenFrame) else event.handle
        if handle not in self._cancelled and not self.is_closed:
            self.push(event)


class ScriptedWorkers:
    """Opens sessions, after a while."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.sessions: dict[str, ScriptedSession] = {}  # by address

    async def open(self, address: str) -> ScriptedSession:
        await asyncio.sleep(self._random.uniform(0.001, 0.3))
        self.sessions[address] = session = ScriptedSession(self._random)
        return session


def status_of(instance_id: str, **changes: Any) -> InstanceStatus:
    return make_status(instance_id, ROLES[instance_id[0]], block_size=BLOCK_SIZE, step_cost=STEP_COST, **changes)


async def run_live(
    instance_ids: tuple[str, ...],
    asks: list[Ask],
    troubles: list[Trouble],
    routing: RoutingSettings,
    request_timeout_s: float,
    seed: int,
) -> Recording:
    """Until every request has ended. Also checks that no consumer gets a wrong token."""
    workers = ScriptedWorkers(Random(seed))
    dispatcher = RecordingDispatcher(
        model=MODEL,
        open_session=workers.open,  # type: ignore[arg-type]
        heartbeat_timeout_s=1e9,
        clock=LoopClock(),
        routing=routing,
        request_timeout_s=request_timeout_s,
    )
    dispatcher.recording = recording = Recording()
    _record_instances(dispatcher, recording)
    fleet = asyncio.create_task(dispatcher.fleet.run())
    for instance_id in instance_ids:
        dispatcher.fleet.heartbeat(status_of(instance_id))
    await asyncio.sleep(0.5)
    begun_s = asyncio.get_running_loop().time()

    async def ask(row: int, one: Ask) -> None:
        await asyncio.sleep(one.at_s)
        request = one.request(row)
        recording.events.append((asyncio.get_running_loop().time(), "arrive", row))
        try:
            running = dispatcher.start(request, asyncio.get_running_loop().time())
        except TandemError:
            recording.num_refused += 1
            return
        received: list[int] = []
        with suppress(TandemError, TimeoutError):
            async with asyncio.timeout(one.cancel_after_s):
                async for tokens in running:
                    received.extend(token.token_id for token in tokens)
        await running.aclose()
        assert received == expected_tokens(request)[: len(received)]

    async def make_trouble(trouble: Trouble) -> None:
        await asyncio.sleep(trouble.at_s)
        status = status_of(trouble.instance_id)
        if trouble.kind == "break" and status.address in workers.sessions:
            workers.sessions[status.address].cut()
        elif trouble.kind == "gone":
            with suppress(InvalidRequestError):
                dispatcher.fleet.heartbeat(replace(status, block_size=0))
        elif trouble.kind != "break":
            dispatcher.fleet.heartbeat(replace(status, **CHANGES[trouble.kind]))
        await asyncio.sleep(trouble.lasts_s)
        if trouble.kind != "break":
            dispatcher.fleet.heartbeat(status)

    async with asyncio.TaskGroup() as group:
        for row, one in enumerate(asks):
            group.create_task(ask(row, one))
        for trouble in troubles:
            group.create_task(make_trouble(trouble))
    assert asyncio.get_running_loop().time() - begun_s < 1000
    fleet.cancel()
    events = len(recording.events)
    await asyncio.gather(fleet, return_exceptions=True)
    del recording.events[events:]  # the end of the fleet
    assert not dispatcher.machine._requests
    return recording


CHANGES: dict[str, dict[str, Any]] = {
    "small": {"max_model_len": 40},
    "foreign": {"uncomputed_tokens": 70, "unreserved_tokens": 100},
    "other layout": {"fingerprint": "g"},
}
KINDS = ("break", "gone", *CHANGES)


def _record_instances(dispatcher: RecordingDispatcher, recording: Recording) -> None:
    """What the fleet tells the machine."""
    machine, is_inside = dispatcher.machine, [False]

    def wrapped(name: str, call: Callable[..., None]) -> Callable[[Any, float], None]:
        def record(what: Any, now_s: float) -> None:
            if is_inside[0]:  # a removal is a loss, too
                call(what, now_s)
                return
            recording.events.append((now_s, name, what))
            is_inside[0] = True
            call(what, now_s)
            is_inside[0] = False

        return record

    for name in ("instance_reported", "instance_connected", "instance_lost", "instance_removed"):
        setattr(machine, name, wrapped(name, getattr(machine, name)))

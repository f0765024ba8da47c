"""Workers without processes: sessions whose events a test sends by hand, or that answer from a small rule."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from tandem.core.clock import Clock, SystemClock
from tandem.core.errors import TandemError, UnavailableError
from tandem.core.request import FinishReason, GenerationRequest, SampledToken, SamplingParams
from tandem.core.session import (
    Cancel,
    InstanceStatus,
    KvReserved,
    NewTokens,
    PrefillFinished,
    PrefillStarted,
    RequestFailed,
    SessionCommand,
    SessionEvent,
    Submit,
    TokenFrame,
    TransferCommitted,
)
from tandem.router.dispatch import Dispatcher
from tandem.router.fleet import Fleet
from tandem.router.profile import ProfileObserver
from tandem.router.records import RequestLog, RequestRecord
from tandem.router.running import RunningRequest
from tandem.scheduling.known_instance import KnownInstance
from tandem.scheduling.routing_settings import RoutingSettings
from tests.instance_status import MODEL, ROLES, make_status

Command = TypeVar("Command", Submit, Cancel)
ROUTING = RoutingSettings(replacement_wait_s=0.3, retry_pause_s=0.01, local_prefill=False)


def make_request(request_id: str = "r", prompt: tuple[int, ...] = (1, 2, 3), **changes: object) -> GenerationRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=5)
    return replace(GenerationRequest(request_id, prompt, sampling), **changes)  # type: ignore[arg-type]


def token_at(prompt: tuple[int, ...], index: int) -> int:
    """Output token number `index` of a prompt: depends on both, so that a lost or repeated one shows."""
    return (7 * sum(prompt) + 31 * index) % 997


def expected_tokens(request: GenerationRequest) -> list[int]:
    return [token_at(request.token_ids, i) for i in range(request.sampling.max_tokens)]


def next_tokens(request: GenerationRequest, count: int, skip: int = 0) -> tuple[SampledToken, ...]:
    """What a right worker generates after `request`, an attempt's own, and `skip` tokens more."""
    prompt = request.token_ids[: request.num_prompt_tokens]
    first = request.num_output_tokens + skip
    for i, token_id in enumerate(request.token_ids[request.num_prompt_tokens :]):
        assert token_id == token_at(prompt, i), "a resumed attempt must bring exactly the tokens generated so far"
    return tuple(SampledToken(token_at(prompt, i)) for i in range(first, first + count))


def finished_event(handle: int, request: GenerationRequest) -> PrefillFinished:
    is_last = request.num_output_tokens + 1 == request.sampling.max_tokens
    return PrefillFinished(
        handle=handle,
        token=next_tokens(request, 1)[0],
        prompt_logprobs=None,
        finish_reason=FinishReason.LENGTH if is_last else None,
        num_cached_tokens=1,
        compute_s=0.001,
    )


class FakeSession:
    """Both ends of a session: the router's methods, and `push`, `cut` and `take` for the test that plays the worker."""

    def __init__(self) -> None:
        self.commands: list[SessionCommand] = []
        self.sent: list[SessionCommand] = []
        self.is_closed = False
        self._events: asyncio.Queue[SessionEvent | TandemError] = asyncio.Queue()

    def send(self, command: SessionCommand) -> None:
        if self.is_closed:
            raise UnavailableError("the worker is gone")
        self.commands.append(command)
        self.sent.append(command)

    async def events(self) -> AsyncIterator[SessionEvent]:
        while True:
            event = await self._events.get()
            if isinstance(event, TandemError):
                raise event
            yield event

    async def close(self) -> None:
        self.is_closed = True

    def push(self, *events: SessionEvent) -> None:
        for event in events:
            self._events.put_nowait(event)

    def cut(self) -> None:
        """The worker dies."""
        self.is_closed = True
        self._events.put_nowait(UnavailableError("the worker ended the session"))

    def take(self, kind: type[Command]) -> Command:
        """The oldest command not yet taken, which must be of that kind."""
        command = self.commands.pop(0)
        assert isinstance(command, kind), command
        return command


@dataclass
class FakeWorkers:
    """Opens sessions in place of `wire`."""

    sessions: dict[str, FakeSession] = field(default_factory=dict)
    refusing: set[str] = field(default_factory=set)
    opened: int = 0

    ids: dict[str, str] = field(default_factory=dict)  # by address

    async def open(self, address: str) -> FakeSession:
        instance_id = self.ids[address]
        if instance_id in self.refusing:
            raise UnavailableError("connection refused")
        self.opened += 1
        self.sessions[instance_id] = FakeSession()
        return self.sessions[instance_id]


@dataclass
class Cluster:
    """A router's token side over fake workers."""

    dispatcher: Dispatcher
    workers: FakeWorkers
    log: RequestLog
    records: list[RequestRecord]

    @property
    def fleet(self) -> Fleet:
        return self.dispatcher.fleet

    def report(self, status: InstanceStatus) -> None:
        """A heartbeat."""
        self.workers.ids[status.address] = status.instance_id
        self.fleet.heartbeat(status)

    async def join(self, *instance_ids: str) -> None:
        """Names begin with the first letter of the role."""
        for instance_id in instance_ids:
            self.report(make_status(instance_id, ROLES[instance_id[0]]))
        await until(lambda: all(self.instance(each).is_connected for each in instance_ids))

    def instance(self, instance_id: str) -> KnownInstance:
        return self.dispatcher.machine.instances[instance_id]

    def is_usable(self, instance_id: str) -> bool:
        instance = self.dispatcher.machine.instances.get(instance_id)
        return instance is not None and instance.is_usable

    def session(self, instance_id: str) -> FakeSession:
        return self.workers.sessions[instance_id]

    def start(self, request: GenerationRequest) -> RunningRequest:
        return self.dispatcher.start(request, SystemClock().now_s())


def make_cluster(
    routing: RoutingSettings = ROUTING,
    heartbeat_timeout_s: float = 60.0,
    profile: ProfileObserver | None = None,
    clock: Clock | None = None,
) -> Cluster:
    workers = FakeWorkers()
    log = RequestLog(capacity=8)
    records: list[RequestRecord] = []
    dispatcher = Dispatcher(
        model=MODEL,
        open_session=workers.open,  # type: ignore[arg-type]
        heartbeat_timeout_s=heartbeat_timeout_s,
        clock=clock or SystemClock(),
        routing=routing,
        request_timeout_s=30.0,
        observers=(log, _Observer(records)),
        profile=profile,
    )
    return Cluster(dispatcher, workers, log, records)


@dataclass
class _Observer:
    records: list[RequestRecord]

    def finished(self, record: RequestRecord) -> None:
        self.records.append(record)

    def refused(self, error: TandemError) -> None:
        pass


@asynccontextmanager
async def running_cluster(
    *instance_ids: str,
    routing: RoutingSettings = ROUTING,
    heartbeat_timeout_s: float = 60.0,
    profile: ProfileObserver | None = None,
    clock: Clock | None = None,
) -> AsyncIterator[Cluster]:
    cluster = make_cluster(routing, heartbeat_timeout_s, profile, clock)
    task = asyncio.create_task(cluster.fleet.run())
    try:
        await cluster.join(*instance_ids)
        yield cluster
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait for something another task will do."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.001)


async def settle() -> None:
    """Let every event that is on its way arrive."""
    for _ in range(10):
        await asyncio.sleep(0)


async def collect(running: RunningRequest) -> list[int]:
    return [token.token_id async for tokens in running for token in tokens]


class Player:
    """Plays both workers of one attempt, a step at a time."""

    def __init__(self, cluster: Cluster, prefill_id: str, decode_id: str = "d1") -> None:
        self.prefill = cluster.session(prefill_id)
        self.decode = cluster.session(decode_id)
        self.submit: Submit
        self.open: Submit

    async def take_submit(self) -> None:
        await until(lambda: self.prefill.commands)
        self.submit = self.prefill.take(Submit)

    async def start_prefill(self) -> None:
        await self.take_submit()
        self.prefill.push(PrefillStarted(self.submit.handle, 1))
        await until(lambda: self.decode.commands)
        self.open = self.decode.take(Submit)

    async def finish_prefill(self) -> None:
        self.prefill.push(finished_event(self.submit.handle, self.submit.request))
        await settle()

    async def commit(self) -> None:
        handle = self.open.handle
        self.decode.push(KvReserved(handle), TransferCommitted(handle, 0.001, 4096, "shared_memory"))
        await settle()

    async def generate(self, count: int, *, skip: int = 1, last: bool = False) -> None:
        """`count` tokens after the first and `skip` - 1 more."""
        item = NewTokens(
            self.open.handle,
            next_tokens(self.open.request, count, skip),
            FinishReason.LENGTH if last else None,
            queue_s=0.0 if skip == 1 else None,
        )
        self.decode.push(TokenFrame((item,)))
        await settle()

    async def fail_decode(self, error: TandemError) -> None:
        self.decode.push(RequestFailed(self.open.handle, error.code, error.message))
        await settle()


async def play_whole(player: Player) -> None:
    await player.start_prefill()
    await player.finish_prefill()
    await player.commit()
    await player.generate(2)
    await player.generate(2, skip=3, last=True)


async def collect_until(error: type[TandemError], running: RunningRequest) -> list[int]:
    """The tokens that came before it failed with that error."""
    received: list[int] = []
    try:
        async for tokens in running:
            received.extend(token.token_id for token in tokens)
    except error:
        return received
    raise AssertionError(f"the request did not fail with {error.__name__}")


async def both_prefills(cluster: Cluster) -> tuple[str, str]:
    """(the one that has the request, the other)"""
    await until(lambda: cluster.session("p1").commands or cluster.session("p2").commands)
    return ("p1", "p2") if cluster.session("p1").commands else ("p2", "p1")


# --- the phases a request can be in when something happens ---

Step = Callable[[Player], Awaitable[None]]


async def queued(player: Player) -> None:
    await player.take_submit()


async def prefilling(player: Player) -> None:
    await player.start_prefill()


async def transferring(player: Player) -> None:
    await player.start_prefill()
    await player.finish_prefill()


async def decoding(player: Player) -> None:
    await transferring(player)
    await player.commit()
    await player.generate(2)

"""A router and a worker over a real gRPC stream on loopback."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from tandem.core.clock import ManualClock, SystemClock
from tandem.core.errors import ConfigError, InvalidRequestError, UnavailableError
from tandem.core.request import FinishReason, GenerationRequest, SampledToken, SamplingParams, TokenLogprob
from tandem.core.request_slo import RequestSlo
from tandem.core.session import (
    Cancel,
    KvReserved,
    KvSource,
    NewTokens,
    PrefillFinished,
    PrefillStarted,
    RequestFailed,
    Role,
    SessionCommand,
    Submit,
    TokenFrame,
    TransferCommitted,
)
from tandem.v1 import worker_pb2_grpc
from tandem.wire import session_messages as messages
from tandem.wire.channels import open_channel
from tandem.wire.server import bind, build_server
from tandem.wire.sessions import InstanceServicer, InstanceSession, Outbox, RoleChange, configure_instance

SAMPLING = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    top_k=5,
    min_p=0.1,
    presence_penalty=-1.5,
    frequency_penalty=0.3,
    repetition_penalty=1.2,
    seed=-(2**62),
    max_tokens=7,
    logprobs=0,
    prompt_logprobs=3,
    stop_token_ids=(1, 2),
    ignore_eos=True,
)
REQUEST = GenerationRequest(
    "r1", (5, 6, 7), SAMPLING, 1, "salt", deadline_s=100.0, epoch=2, slo=RequestSlo("chat", 0.5)
)
LOGPROB = TokenLogprob(3, -0.5, ((3, -0.5), (4, -1.0)))


class EchoWorker:
    """Answers an open with a reservation and one frame, and remembers what it was told."""

    def __init__(self) -> None:
        self.outboxes: dict[int, Outbox] = {}
        self.commands: list[SessionCommand] = []
        self.changes: list[RoleChange] = []
        self.routers: list[str] = []
        self.session_closed = asyncio.Event()

    def open_session(self, outbox: Outbox) -> int:
        self.outboxes[len(self.outboxes)] = outbox
        return len(self.outboxes) - 1

    def handle(self, session_id: int, command: SessionCommand) -> None:
        self.commands.append(command)
        if isinstance(command, Submit):
            self.outboxes[session_id].put(KvReserved(command.handle))
            tokens = NewTokens(command.handle, (SampledToken(9),), FinishReason.STOP, 0.25)
            self.outboxes[session_id].put(TokenFrame((tokens,)))

    def close_session(self, session_id: int) -> None:
        self.session_closed.set()

    def configure(self, change: RoleChange) -> None:
        if change.max_batch == 99:
            raise ConfigError("there is no such bound")
        self.changes.append(change)

    def set_routers(self, control_addresses: Sequence[str]) -> None:
        self.routers = list(control_addresses)


@asynccontextmanager
async def serving(worker: EchoWorker, token: str | None = None) -> AsyncIterator[str]:
    server, _ = build_server(token)
    worker_pb2_grpc.add_InstanceServiceServicer_to_server(InstanceServicer(worker, SystemClock(), "d-0"), server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


async def test_commands_and_events_cross_in_order_and_closing_drops_the_session() -> None:
    worker = EchoWorker()
    async with serving(worker) as address:
        session = await InstanceSession.open(address)
        session.send(Submit(1, REQUEST, KvSource("p0", "127.0.0.1:1")))
        session.send(Cancel(1))
        events = session.events()
        assert await anext(events) == KvReserved(1)
        frame = await anext(events)
        assert frame == TokenFrame((NewTokens(1, (SampledToken(9),), FinishReason.STOP, 0.25),))
        await session.close()
        with pytest.raises(UnavailableError):
            session.send(Cancel(2))
        async with asyncio.timeout(10):
            await worker.session_closed.wait()
        assert [type(command) for command in worker.commands] == [Submit, Cancel]


async def test_log_probabilities_of_a_long_prompt_are_converted_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """25,000 tokens with 20 alternatives take half a second. The order of events stays."""
    threads: list[bool] = []
    for name in ("event_to_pb", "event_from_pb"):
        convert = getattr(messages, name)

        def recorded(value: Any, convert: Any = convert) -> Any:
            if isinstance(value, PrefillFinished) or (hasattr(value, "HasField") and value.HasField("finished")):
                threads.append(threading.current_thread() is not threading.main_thread())
            return convert(value)

        monkeypatch.setattr(messages, name, recorded)
    short, long = (
        PrefillFinished(handle, SampledToken(9), (None, *[LOGPROB] * count), None, 0, 0.5)
        for handle, count in ((1, 3), (2, 2000))
    )
    worker = EchoWorker()
    async with serving(worker) as address:
        session = await InstanceSession.open(address)
        events = session.events()
        session.send(Submit(3, REQUEST))
        assert await anext(events) == KvReserved(3)
        for event in (long, short, KvReserved(4)):
            worker.outboxes[0].put(event)
        await anext(events)
        assert [await anext(events) for _ in range(3)] == [long, short, KvReserved(4)]
        await session.close()
    assert sorted(threads) == [False, False, True, True]


async def test_a_worker_that_stops_is_reported_as_unavailable() -> None:
    worker = EchoWorker()
    with pytest.raises(UnavailableError, match="did not answer"):
        await InstanceSession.open("127.0.0.1:1", timeout_s=0.3)
    async with serving(worker) as address:
        session = await InstanceSession.open(address)
        session.send(Submit(1, REQUEST, KvSource("p0", "127.0.0.1:1")))
        events = session.events()
        await anext(events)
    with pytest.raises(UnavailableError):
        async for _ in events:
            pass
    await session.close()


async def test_a_session_needs_the_cluster_token() -> None:
    worker = EchoWorker()
    async with serving(worker, token="secret") as address:
        session = await InstanceSession.open(address, token="wrong")
        with pytest.raises(UnavailableError, match="token"):
            await anext(session.events())
        await session.close()
        session = await InstanceSession.open(address, token="secret")
        session.send(Submit(1, REQUEST, KvSource("p0", "127.0.0.1:1")))
        assert await anext(session.events()) == KvReserved(1)
        await session.close()


async def test_a_port_in_use_is_refused_with_a_sentence() -> None:

    async with serving(EchoWorker()) as address:
        server, _ = build_server()
        with pytest.raises(ConfigError, match="in use"):
            bind(server, address)


async def test_nonsense_ends_the_session_and_not_the_worker() -> None:
    worker = EchoWorker()
    async with serving(worker) as address, open_channel(address) as channel:
        call = worker_pb2_grpc.InstanceServiceStub(channel).Session()
        await call.write(messages.worker_pb2.SessionRequest())
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        session = await InstanceSession.open(address)
        session.send(Submit(1, REQUEST, KvSource("p0", "127.0.0.1:1")))
        assert await anext(session.events()) == KvReserved(1)
        await session.close()


async def test_a_command_that_cannot_be_written_ends_the_session_instead_of_queueing_for_ever() -> None:
    worker = EchoWorker()
    async with serving(worker) as address:
        session = await InstanceSession.open(address)
        broken = replace(REQUEST, sampling=replace(SAMPLING, max_tokens="many"))  # type: ignore[arg-type]
        session.send(Submit(1, broken))
        async with asyncio.timeout(10):
            with pytest.raises(UnavailableError, match="could not be sent"):
                await anext(session.events())
        with pytest.raises(UnavailableError):
            session.send(Cancel(1))
        await session.close()


async def test_a_running_instance_takes_another_role_or_says_why_not() -> None:
    worker = EchoWorker()
    async with serving(worker) as address, open_channel(address) as channel:
        change = RoleChange(Role.COLOCATED, max_batch=3, max_prefill_tokens=64)
        assert await configure_instance(channel, change) == "d-0"
        assert worker.changes == [change]
        with pytest.raises(ConfigError, match="no such bound"):
            await configure_instance(channel, RoleChange(Role.PREFILL, max_batch=99))


def test_messages_round_trip() -> None:
    now_s = ManualClock(90.0).now_s()
    source = KvSource("p", "h:1")
    for command in (Submit(3, REQUEST), Submit(3, REQUEST, source), Submit(3, REQUEST, hand_over=True), Cancel(4)):
        assert messages.command_from_pb(messages.command_to_pb(command, now_s), now_s) == command
    frame = TokenFrame((NewTokens(1, (SampledToken(3, LOGPROB),) * 2), NewTokens(2, ())))
    for event in (
        PrefillStarted(1, 32),
        PrefillFinished(1, SampledToken(3, LOGPROB), (None, LOGPROB), FinishReason.LENGTH, 16, 0.5),
        KvReserved(1),
        TransferCommitted(1, 0.5, 99, "gloo", 64, 0.25),
        frame,
        RequestFailed(2, "overloaded", "full"),
    ):
        assert messages.event_from_pb(messages.event_to_pb(event)) == event


def test_commands_and_events_that_make_no_sense_are_refused() -> None:
    both = messages.command_to_pb(Submit(3, REQUEST, KvSource("p", "h:1")), 90.0)
    both.submit.hand_over = True
    nameless = messages.command_to_pb(Submit(3, REQUEST, KvSource("", "h:1")), 90.0)
    for command in (both, nameless, messages.worker_pb2.SessionRequest()):
        with pytest.raises(InvalidRequestError):
            messages.command_from_pb(command, 90.0)
    uneven = messages.event_to_pb(TokenFrame((NewTokens(1, (SampledToken(3, LOGPROB),)),)))
    uneven.frame.items[0].token_ids.append(4)
    for event in (uneven, messages.worker_pb2.SessionResponse()):
        with pytest.raises(InvalidRequestError):
            messages.event_from_pb(event)

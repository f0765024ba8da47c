"""A router and a worker over a real gRPC stream on loopback."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from tandem.core.clock import ManualClock, SystemClock
from tandem.core.errors import ConfigError, UnavailableError
from tandem.core.request import FinishReason, GenerationRequest, SampledToken, SamplingParams, TokenLogprob
from tandem.core.session import (
    Cancel,
    DecodeCommand,
    DecodeEvent,
    DecodeFrame,
    DecodeReserved,
    DecodeTokens,
    KvSource,
    OpenDecode,
    PrefillFinished,
    PrefillStarted,
    RequestFailed,
    SubmitPrefill,
    TransferCommitted,
)
from tandem.v1 import worker_pb2_grpc
from tandem.wire import session_messages as messages
from tandem.wire.channels import open_channel
from tandem.wire.server import bind, build_server
from tandem.wire.sessions import DecodeServicer, DecodeSession, Outbox

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
REQUEST = GenerationRequest("r1", (5, 6, 7), SAMPLING, 1, "salt", deadline_s=100.0, epoch=2)
LOGPROB = TokenLogprob(3, -0.5, ((3, -0.5), (4, -1.0)))


class EchoWorker:
    """Answers an open with a reservation and one frame, and remembers what it was told."""

    def __init__(self) -> None:
        self.outboxes: dict[int, Outbox[DecodeEvent]] = {}
        self.commands: list[DecodeCommand] = []
        self.session_closed = asyncio.Event()

    def open_session(self, outbox: Outbox[DecodeEvent]) -> int:
        self.outboxes[len(self.outboxes)] = outbox
        return len(self.outboxes) - 1

    def handle(self, session_id: int, command: DecodeCommand) -> None:
        self.commands.append(command)
        if isinstance(command, OpenDecode):
            self.outboxes[session_id].put(DecodeReserved(command.handle))
            tokens = DecodeTokens(command.handle, (SampledToken(9),), FinishReason.STOP, 0.25)
            self.outboxes[session_id].put(DecodeFrame((tokens,), 0.5))

    def close_session(self, session_id: int) -> None:
        self.session_closed.set()


@asynccontextmanager
async def serving(worker: EchoWorker, token: str | None = None) -> AsyncIterator[str]:
    server, _ = build_server(token)
    worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(worker, SystemClock()), server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


async def test_commands_and_events_cross_in_order_and_closing_drops_the_session() -> None:
    worker = EchoWorker()
    async with serving(worker) as address, open_channel(address) as channel:
        session = await DecodeSession.open(channel)
        session.send(OpenDecode(1, REQUEST, KvSource("p0", "127.0.0.1:1")))
        session.send(Cancel(1))
        events = session.events()
        assert await anext(events) == DecodeReserved(1)
        frame = await anext(events)
        assert frame == DecodeFrame((DecodeTokens(1, (SampledToken(9),), FinishReason.STOP, 0.25),), 0.5)
        await session.close()
        with pytest.raises(UnavailableError):
            session.send(Cancel(2))
        async with asyncio.timeout(2):
            await worker.session_closed.wait()
        assert [type(command) for command in worker.commands] == [OpenDecode, Cancel]


async def test_a_worker_that_stops_is_reported_as_unavailable() -> None:
    worker = EchoWorker()
    async with open_channel("127.0.0.1:1") as channel:
        with pytest.raises(UnavailableError, match="did not answer"):
            await DecodeSession.open(channel, timeout_s=0.3)
    async with serving(worker) as address:
        channel = open_channel(address)
        session = await DecodeSession.open(channel)
        session.send(OpenDecode(1, REQUEST, KvSource("p0", "127.0.0.1:1")))
        events = session.events()
        await anext(events)
    with pytest.raises(UnavailableError):
        async for _ in events:
            pass
    await session.close()
    await channel.close()


async def test_a_session_needs_the_cluster_token() -> None:
    worker = EchoWorker()
    async with serving(worker, token="secret") as address:
        async with open_channel(address) as channel:
            session = await DecodeSession.open(channel, token="wrong")
            with pytest.raises(UnavailableError, match="token"):
                await anext(session.events())
            await session.close()
        async with open_channel(address) as channel:
            session = await DecodeSession.open(channel, token="secret")
            session.send(OpenDecode(1, REQUEST, KvSource("p0", "127.0.0.1:1")))
            assert await anext(session.events()) == DecodeReserved(1)
            await session.close()


async def test_a_port_in_use_is_refused_with_a_sentence() -> None:

    async with serving(EchoWorker()) as address:
        server, _ = build_server()
        with pytest.raises(ConfigError, match="in use"):
            bind(server, address)


async def test_nonsense_ends_the_session_and_not_the_worker() -> None:
    worker = EchoWorker()
    async with serving(worker) as address, open_channel(address) as channel:
        call = worker_pb2_grpc.DecodeServiceStub(channel).Session()
        await call.write(messages.worker_pb2.DecodeSessionRequest())
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        session = await DecodeSession.open(channel)
        session.send(OpenDecode(1, REQUEST, KvSource("p0", "127.0.0.1:1")))
        assert await anext(session.events()) == DecodeReserved(1)
        await session.close()


def test_messages_round_trip() -> None:
    now_s = ManualClock(90.0).now_s()
    for prefill_command in (SubmitPrefill(3, REQUEST), Cancel(4)):
        pb = messages.prefill_command_to_pb(prefill_command, now_s)
        assert messages.prefill_command_from_pb(pb, now_s) == prefill_command
    for decode_command in (OpenDecode(3, REQUEST, KvSource("p", "h:1")), Cancel(4)):
        pb_decode = messages.decode_command_to_pb(decode_command, now_s)
        assert messages.decode_command_from_pb(pb_decode, now_s) == decode_command
    finished = PrefillFinished(1, SampledToken(3, LOGPROB), (None, LOGPROB), FinishReason.LENGTH, 16, 0.25, 0.5)
    for prefill_event in (PrefillStarted(1, 32), finished, RequestFailed(2, "overloaded", "full")):
        assert messages.prefill_event_from_pb(messages.prefill_event_to_pb(prefill_event)) == prefill_event
    frame = DecodeFrame((DecodeTokens(1, (SampledToken(3, LOGPROB),) * 2), DecodeTokens(2, ())), 0.125)
    for decode_event in (DecodeReserved(1), TransferCommitted(1, 0.5, 99, "gloo"), frame, RequestFailed(1, "x", "y")):
        assert messages.decode_event_from_pb(messages.decode_event_to_pb(decode_event)) == decode_event

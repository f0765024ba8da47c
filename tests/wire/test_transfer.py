"""The KV transfer's control channel over a real gRPC stream on loopback, with both sides of the data plane faked."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest

from tandem.core.clock import SystemClock
from tandem.core.errors import (
    DeadlineError,
    IncompatiblePeerError,
    InvalidRequestError,
    StaleEpochError,
    TransferError,
    UnavailableError,
)
from tandem.core.kv_frontier import KvFrontier, StageFrontier, TransferChunk
from tandem.core.request import SampledToken, TokenLogprob
from tandem.core.transfer import (
    ComputedKv,
    Grant,
    GrantReply,
    HostIdentity,
    LinkOffer,
    LinkReply,
    Manifest,
    PeerGoneError,
    Transport,
)
from tandem.v1 import transfer_pb2, transfer_pb2_grpc
from tandem.wire.channels import open_channel
from tandem.wire.server import bind, build_server
from tandem.wire.transfer import KvTransferClient, KvTransferServicer
from tandem.wire.transfer_calls import MAX_CALLS

OFFER = LinkOffer(
    "decode-0", "f" * 32, HostIdentity("boot", 1000), (Transport.NCCL, Transport.SHARED_MEMORY, Transport.GLOO)
)
REPLY = LinkReply(
    "link-1",
    "prefill-0",
    "f" * 32,
    Transport.SHARED_MEMORY,
    77,
    32,
    2,
    (3, 2),
    "socket",
    (b"\x00nonce", b"b", b"c", b""),
)
TOKEN = SampledToken(3, TokenLogprob(3, -0.5, ((3, -0.5), (4, -1.0))))
MANIFEST = Manifest("r", 2, 5, "h" * 32, (9, 0, 4), "f" * 32, 32, TOKEN)
PART = TransferChunk(range(1, 4), range(3))
FRONTIER = KvFrontier(2, 1, 3, 4, 6, (StageFrontier(0, 2, 1, 5), StageFrontier(0, 1, 0, 4)))
COMPUTED = ComputedKv("r", 3, (9, 0, 4), 32, FRONTIER)
GRANT = Grant("link-1", "r", 2, 6, 3, 2, PART, 1 << 40, 1 << 20, True)


@dataclass
class FakeSide:
    """Remembers what it was asked (`KvLinkServer` and `KvHolder`); `error` is raised instead of any answer."""

    asked: list[object] = field(default_factory=list)
    error: Exception | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    values: dict[str, bytes] = field(default_factory=dict)
    stop: Callable[[], Awaitable[None]] = field(init=False)

    def _answer(self, *asked: object) -> None:
        self.asked.append(asked)
        if self.error is not None:
            raise self.error

    async def link(self, offer: LinkOffer) -> LinkReply:
        self._answer(offer)
        return REPLY

    async def ended(self, link_id: str) -> None:
        await self.over.wait()

    def unlink(self, link_id: str) -> None:
        self.asked.append(("unlink", link_id))

    async def send(self, grant: Grant, kv: ComputedKv | Manifest) -> GrantReply:
        self._answer(grant, kv)
        return GrantReply(1 << 40, 0xFFFFFFFF)

    async def rendezvous_set(self, link_id: str, key: str, value: bytes) -> None:
        self.values[f"{link_id}/{key}"] = value

    async def rendezvous_get(self, link_id: str, key: str, timeout_s: float) -> bytes:
        return self.values[f"{link_id}/{key}"]

    async def manifest(self, request_id: str, epoch: int, deadline_s: float) -> Manifest:
        self._answer(request_id, epoch, round(deadline_s - SystemClock().now_s()))
        return MANIFEST

    async def computed(
        self, request_id: str, epoch: int, known: KvFrontier, min_new: int, has_all: bool, deadline_s: float
    ) -> ComputedKv | Manifest:
        self._answer(request_id, epoch, known, min_new, has_all, round(deadline_s - SystemClock().now_s()))
        return COMPUTED if epoch == 3 else MANIFEST

    def readable(self, request_id: str, epoch: int) -> ComputedKv | Manifest:
        self._answer(request_id, epoch)
        return MANIFEST

    async def acknowledge(self, request_id: str, epoch: int) -> bool:
        self._answer(request_id, epoch)
        return epoch == 2


@asynccontextmanager
async def connected(token: str | None = None) -> AsyncIterator[tuple[FakeSide, KvTransferClient, grpc.aio.Channel]]:
    side = FakeSide()
    server, _ = build_server(token)
    servicer = KvTransferServicer(side, side, SystemClock())
    transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(servicer, server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    side.stop = lambda: server.stop(None)
    channel = open_channel(address)
    try:
        yield side, KvTransferClient(channel, "prefill-0", token), channel
    finally:
        await channel.close()
        await server.stop(None)


async def test_every_value_arrives_as_it_was_sent() -> None:
    async with connected() as (side, client, _):
        assert await client.link(OFFER, 5.0) == REPLY
        assert await client.pull("r", 2, 60.0) == MANIFEST
        assert await client.grant(GRANT, 60.0) == GrantReply(1 << 40, 0xFFFFFFFF)
        assert await client.acknowledge("r", 2, 5.0) is True
        assert await client.acknowledge("r", 1, 5.0) is False
        await client.rendezvous_set("link-1", "0/1", b"\x00\xff", 5.0)
        assert await client.rendezvous_get("link-1", "0/1", 5.0) == b"\x00\xff"
        assert side.asked == [(OFFER,), ("r", 2, 60), ("r", 2), (GRANT, MANIFEST), ("r", 2), ("r", 1)]


async def test_what_is_computed_arrives_as_it_was_sent() -> None:
    async with connected() as (side, client, _):
        assert await client.pull_computed("r", 3, FRONTIER, 7, True, 60.0) == COMPUTED
        assert await client.pull_computed("r", 2, KvFrontier(), 7, False, 60.0) == MANIFEST
        assert side.asked == [("r", 3, FRONTIER, 7, True, 60), ("r", 2, KvFrontier(), 7, False, 60)]
        side.asked.clear()
        for known, min_new in ((KvFrontier(1, 3, 2), 7), (KvFrontier(1, 0, 2, 5, 4), 7), (FRONTIER, 0)):
            with pytest.raises(InvalidRequestError):
                await client.pull_computed("r", 3, known, min_new, False, 60.0)
        assert side.asked == []


@pytest.mark.parametrize("token", [None, "secret"])
async def test_a_link_ends_for_both_when_one_ends_it(token: str | None) -> None:
    async with connected(token) as (side, client, _):
        await client.link(OFFER, 5.0)
        assert client.is_linked("link-1")
        assert not client.is_linked("another")
        client.unlink("link-1")
        client.unlink("link-1")
        assert not client.is_linked("link-1")
        async with asyncio.timeout(5.0):
            while ("unlink", "link-1") not in side.asked:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

        await client.link(OFFER, 5.0)
        side.over.set()
        async with asyncio.timeout(5.0):
            while client.is_linked("link-1"):  # noqa: ASYNC110
                await asyncio.sleep(0.001)


async def test_errors_keep_their_kind() -> None:
    async with connected() as (side, client, _):
        for error in (TransferError("a"), StaleEpochError("b"), UnavailableError("c"), DeadlineError("d")):
            side.error = error
            for call in (client.pull("r", 2, 5.0), client.acknowledge("r", 2, 5.0), client.link(OFFER, 5.0)):
                with pytest.raises(type(error)) as caught:
                    await call
                assert type(caught.value) is type(error)
                assert caught.value.message == error.message


async def test_a_peer_that_is_gone_is_told_from_an_answer() -> None:
    channel = open_channel("127.0.0.1:1")
    client = KvTransferClient(channel, "prefill-0")
    for call in (client.pull("r", 2, 5.0), client.link(OFFER, 5.0)):
        with pytest.raises(PeerGoneError) as caught:
            await call
        assert "127.0.0.1" not in caught.value.message
    await channel.close()


async def test_a_call_without_time_or_names_is_refused() -> None:
    async with connected() as (side, client, channel):
        with pytest.raises(InvalidRequestError):
            await client.pull("", 2, 5.0)
        with pytest.raises(InvalidRequestError):
            await client.pull("x" * 1000, 2, 5.0)
        with pytest.raises(InvalidRequestError):
            await client.rendezvous_set("", "key", b"", 5.0)
        stream = transfer_pb2_grpc.KvTransferServiceStub(channel).Calls()
        for timeout_s in (0.0, -1.0, float("inf"), float("nan")):
            pull = transfer_pb2.PullRequest(request_id="r")
            await stream.write(transfer_pb2.TransferCall(id=1, timeout_s=timeout_s, pull=pull))
            answer = await stream.read()
            assert (answer.id, answer.error.code) == (1, InvalidRequestError.code)
        await stream.write(transfer_pb2.TransferCall(id=2, timeout_s=1.0))
        assert (await stream.read()).error.code == InvalidRequestError.code
        assert side.asked == []


async def test_a_link_ends_when_the_other_side_is_gone() -> None:
    for token in (None, "secret"):
        async with connected(token) as (_, client, _):
            await client.link(OFFER, 5.0)
        async with asyncio.timeout(5.0):
            while client.is_linked("link-1"):  # noqa: ASYNC110
                await asyncio.sleep(0.001)


async def test_the_deadline_bounds_a_link_up() -> None:
    async with connected() as (side, client, _):

        async def forever(offer: LinkOffer) -> LinkReply:
            await asyncio.Event().wait()
            raise AssertionError

        side.link = forever  # type: ignore[method-assign]
        with pytest.raises(DeadlineError):
            await client.link(OFFER, 0.2)


async def test_a_channel_that_is_closed_during_a_call_is_no_cancellation() -> None:
    async with connected() as (side, client, channel):
        await client.link(OFFER, 5.0)
        unlinked = asyncio.Event()
        client.when_unlinked("link-1", unlinked.set)

        async def forever(*_: object) -> Any:
            await asyncio.Event().wait()

        side.manifest = side.link = forever  # type: ignore[method-assign]
        calls = [asyncio.create_task(call) for call in (client.pull("r", 2, 60.0), client.link(OFFER, 60.0))]
        await asyncio.sleep(0.1)
        assert client.in_use
        assert not client.is_gone
        await channel.close()
        calls.append(asyncio.create_task(client.pull("r", 2, 60.0)))
        calls.append(asyncio.create_task(client.link(OFFER, 60.0)))
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [PeerGoneError] * 4
        async with asyncio.timeout(5.0):
            await unlinked.wait()
        assert client.is_gone
        assert not client.in_use
        assert not client.is_linked("link-1")


async def test_a_cancelled_task_stays_cancelled() -> None:
    async with connected() as (side, client, _):

        async def forever(*_: object) -> Any:
            await asyncio.Event().wait()

        side.manifest = forever  # type: ignore[method-assign]
        pulling = asyncio.create_task(client.pull("r", 2, 60.0))
        await asyncio.sleep(0.1)
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        assert not client.is_gone
        assert not client.in_use


async def test_a_server_that_stops_or_fails_gives_retryable_errors() -> None:
    async with connected() as (side, client, _):

        async def fail(*_: object) -> Any:
            raise RuntimeError("a fault of the other side")

        side.manifest = fail  # type: ignore[method-assign]
        with pytest.raises(TransferError):
            await client.pull("r", 2, 5.0)

        async def forever(*_: object) -> Any:
            await asyncio.Event().wait()

        side.manifest = forever  # type: ignore[method-assign]
        pulling = asyncio.create_task(client.pull("r", 2, 60.0))
        await asyncio.sleep(0.1)
        await side.stop()
        with pytest.raises(PeerGoneError):
            await pulling


async def test_the_end_of_a_link_is_told_once() -> None:
    async with connected() as (side, client, _):
        told: list[str] = []
        await client.link(OFFER, 5.0)
        client.when_unlinked("link-1", lambda: told.append("by the other side"))
        side.over.set()
        async with asyncio.timeout(5.0):
            while not told:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        client.when_unlinked("link-1", lambda: told.append("at once"))
        side.over.clear()
        await client.link(OFFER, 5.0)
        client.when_unlinked("link-1", lambda: told.append("by us"))
        client.unlink("link-1")
        async with asyncio.timeout(5.0):
            while len(told) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert told == ["by the other side", "at once", "by us"]
        assert not client.is_gone


async def test_calls_do_not_wait_for_each_other() -> None:
    async with connected() as (side, client, _):
        finished = {f"r{i}": asyncio.Event() for i in range(20)}

        async def manifest(request_id: str, epoch: int, deadline_s: float) -> Manifest:
            await finished[request_id].wait()
            return replace(MANIFEST, request_id=request_id)

        side.manifest = manifest  # type: ignore[method-assign]
        pulls = {name: asyncio.create_task(client.pull(name, 2, 60.0)) for name in finished}
        assert await client.acknowledge("r", 2, 5.0)
        for name in reversed(finished):
            finished[name].set()
            assert (await pulls[name]).request_id == name
        assert not client.in_use


async def test_a_caller_that_gives_up_frees_the_other_side() -> None:
    async with connected() as (side, client, _):
        given_up = asyncio.Event()

        async def forever(*_: object) -> Any:
            try:
                await asyncio.Event().wait()
            finally:
                given_up.set()

        side.manifest = forever  # type: ignore[method-assign]
        pulling = asyncio.create_task(client.pull("r", 2, 60.0))
        await asyncio.sleep(0.1)
        pulling.cancel()
        async with asyncio.timeout(5.0):
            await given_up.wait()
        given_up.clear()
        with pytest.raises(DeadlineError):
            await client.pull("r", 2, 0.1)
        async with asyncio.timeout(5.0):
            await given_up.wait()
        assert await client.acknowledge("r", 2, 5.0), "the stream goes on"


async def test_another_version_is_refused_on_both_sides() -> None:
    async with connected() as (side, _, channel):
        link = transfer_pb2_grpc.KvTransferServiceStub(channel).Link
        older = transfer_pb2.LinkRequest(instance_id="decode-0", fingerprint="f", boot_id="b", transports=[1])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await link(older).read()
        assert dict(caught.value.trailing_metadata() or ())["tandem-code"] == IncompatiblePeerError.code
        assert side.asked == []

    class Older(transfer_pb2_grpc.KvTransferServiceServicer):
        async def Link(self, request: transfer_pb2.LinkRequest, context: Any) -> AsyncIterator[Any]:
            yield transfer_pb2.LinkResponse(link_id="l", instance_id="prefill-0", transport=1)

    server, _ = build_server()
    transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(Older(), server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    async with open_channel(address) as channel:
        with pytest.raises(IncompatiblePeerError, match="versions of tandem"):
            await KvTransferClient(channel, "prefill-0").link(OFFER, 5.0)
    await server.stop(None)


async def test_a_stream_has_bounds() -> None:
    async with connected() as (side, _, channel):

        async def forever(*_: object) -> Any:
            await asyncio.Event().wait()

        side.manifest = forever  # type: ignore[method-assign]

        def pull(number: int) -> transfer_pb2.TransferCall:
            request = transfer_pb2.PullRequest(request_id="r", epoch=1)
            return transfer_pb2.TransferCall(id=number, timeout_s=60.0, pull=request)

        calls = transfer_pb2_grpc.KvTransferServiceStub(channel).Calls
        for numbers, status in (((1, 1), "INVALID_ARGUMENT"), (range(MAX_CALLS + 1), "RESOURCE_EXHAUSTED")):
            stream = calls(pull(number) for number in numbers)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
            assert caught.value.code().name == status

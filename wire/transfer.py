"""The control channel of KV transfers: a client for decode instances (`PeerControl`), a servicer for prefill."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from typing import Any

import grpc

from tandem.core.clock import Clock
from tandem.core.errors import (
    DeadlineError,
    IncompatiblePeerError,
    InternalError,
    InvalidRequestError,
    TandemError,
    TransferError,
)
from tandem.core.kv_frontier import KvFrontier
from tandem.core.transfer import (
    ComputedKv,
    Grant,
    GrantReply,
    HostIdentity,
    KvHolder,
    KvLinkServer,
    LinkOffer,
    LinkReply,
    Manifest,
    PeerGoneError,
)
from tandem.rpc_errors import CODE_KEY, error_from_rpc
from tandem.v1 import transfer_pb2, transfer_pb2_grpc
from tandem.wire.channels import token_metadata
from tandem.wire.transfer_calls import CallStream, answer_calls
from tandem.wire.transfer_messages import (
    computed_from_pb,
    computed_to_pb,
    frontier_from_pb,
    frontier_to_pb,
    grant_from_pb,
    grant_to_pb,
    link_reply_from_pb,
    link_reply_to_pb,
    manifest_from_pb,
    manifest_to_pb,
    transports_from_pb,
    transports_to_pb,
)

_FAILED = "the prefill worker failed; its log has the reason"
_OTHER_VERSION = "the two workers are of versions of tandem that do not exchange KV; use one version for both"

MAX_NAME_LENGTH = 256
MAX_TRANSPORTS = 8
MAX_STAGES = 64
PROTOCOL = 2  # how the calls after `Link` are made


class KvTransferClient:
    """A prefill instance as decode reaches it (`core.transfer.PeerControl`). The caller closes the channel.

    `token` is for a channel that was opened without one: interceptors slow down calls, and transfers wait for calls.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        instance_id: str,
        token: str | None = None,
        when_gone: Callable[[], None] | None = None,
    ) -> None:
        """`when_gone` is called once, on the event loop, when the peer is found to be gone."""
        self._metadata = token_metadata(token)
        self._when_gone = when_gone
        self._stub = transfer_pb2_grpc.KvTransferServiceStub(channel)
        self.instance_id = instance_id
        self.is_gone = False
        self._calls = 0  # in progress
        self._stream: CallStream | None = None
        self._links: dict[str, asyncio.Task[None]] = {}  # each task reads its `Link` stream, and ends with the stream

    @property
    def in_use(self) -> bool:
        """Whether a call is in progress or a link is open, which a close of the channel would end."""
        return self._calls > 0 or bool(self._links)

    async def link(self, offer: LinkOffer, timeout_s: float) -> LinkReply:
        request = transfer_pb2.LinkRequest(
            instance_id=offer.instance_id,
            fingerprint=offer.fingerprint,
            boot_id=offer.host.boot_id,
            uid=offer.host.uid,
            transports=transports_to_pb(offer.transports),
            kv_format=offer.kv_format,
            protocol=PROTOCOL,
        )
        with self._call():
            call = self._stub.Link(request, metadata=self._metadata)
            try:
                async with asyncio.timeout(timeout_s):
                    answer = await call.read()
                if answer is grpc.aio.EOF:
                    raise TransferError("the prefill worker ended the link before it was made")
                if answer.protocol != PROTOCOL:
                    raise IncompatiblePeerError(_OTHER_VERSION)
                reply = link_reply_from_pb(answer)
            except BaseException as error:
                call.cancel()
                if isinstance(error, TimeoutError):
                    raise DeadlineError("the prefill worker did not answer in time") from error
                raise
        reading = asyncio.create_task(self._read_to_end(call), name=f"kv-link-{reply.link_id}")
        self._links[reply.link_id] = reading
        reading.add_done_callback(partial(self._link_ended, reply.link_id, call))
        return reply

    async def _read_to_end(self, call: grpc.aio.UnaryStreamCall[Any, Any]) -> None:
        with suppress(TandemError), self._call():  # every error means that the link has ended
            await call.read()

    def _link_ended(self, link_id: str, call: grpc.aio.UnaryStreamCall[Any, Any], reading: asyncio.Task[None]) -> None:
        call.cancel()  # not in the task, because a task that is cancelled before its first step runs no code
        if self._links.get(link_id) is reading:
            del self._links[link_id]

    def is_linked(self, link_id: str) -> bool:
        return link_id in self._links

    def when_unlinked(self, link_id: str, callback: Callable[[], None]) -> None:
        if (reading := self._links.get(link_id)) is not None:
            reading.add_done_callback(lambda _: callback())
        else:
            callback()

    def unlink(self, link_id: str) -> None:
        if reading := self._links.pop(link_id, None):
            reading.cancel()

    async def pull(self, request_id: str, epoch: int, timeout_s: float) -> Manifest:
        request = transfer_pb2.PullRequest(request_id=request_id, epoch=epoch)
        answer = await self._ask(transfer_pb2.TransferCall(pull=request), timeout_s)
        return manifest_from_pb(answer.pulled)

    async def pull_computed(
        self, request_id: str, epoch: int, known: KvFrontier, min_new: int, has_all: bool, timeout_s: float
    ) -> ComputedKv | Manifest:
        request = transfer_pb2.PullComputedRequest(
            request_id=request_id,
            epoch=epoch,
            known=frontier_to_pb(known),
            min_new=min_new,
            has_all=has_all,
        )
        answer = await self._ask(transfer_pb2.TransferCall(pull_computed=request), timeout_s)
        reply = answer.computed
        return manifest_from_pb(reply.finished) if reply.HasField("finished") else computed_from_pb(reply.computed)

    async def grant(self, grant: Grant, timeout_s: float) -> GrantReply:
        answer = await self._ask(transfer_pb2.TransferCall(grant=grant_to_pb(grant)), timeout_s)
        return GrantReply(answer.granted.sent_bytes, answer.granted.checksum)

    async def acknowledge(self, request_id: str, epoch: int, timeout_s: float) -> bool:
        request = transfer_pb2.AcknowledgeRequest(request_id=request_id, epoch=epoch)
        answer = await self._ask(transfer_pb2.TransferCall(acknowledge=request), timeout_s)
        return bool(answer.acknowledged.owned)

    async def rendezvous_set(self, link_id: str, key: str, value: bytes, timeout_s: float) -> None:
        request = transfer_pb2.RendezvousSetRequest(link_id=link_id, key=key, value=value)
        await self._unary(self._stub.RendezvousSet, request, timeout_s)

    async def rendezvous_get(self, link_id: str, key: str, timeout_s: float) -> bytes:
        request = transfer_pb2.RendezvousGetRequest(link_id=link_id, key=key)
        reply = await self._unary(self._stub.RendezvousGet, request, timeout_s)
        return bytes(reply.value)

    async def _ask(self, call: transfer_pb2.TransferCall, timeout_s: float) -> transfer_pb2.TransferAnswer:
        with self._call():
            if self._stream is None or self._stream.has_ended:
                self._stream = CallStream(self._stub.Calls(metadata=self._metadata))
            return await self._stream.ask(call, timeout_s)

    async def _unary(self, method: Callable[..., Any], request: Any, timeout_s: float) -> Any:
        with self._call():
            return await method(request, timeout=max(0.0, timeout_s), metadata=self._metadata)

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Counts a call, and turns its errors into TandemErrors."""
        self._calls += 1
        try:
            yield
        except InternalError as error:  # of that worker; another one may do
            raise TransferError(_FAILED) from error
        except grpc.aio.AioRpcError as error:
            trailing = error.trailing_metadata()
            if trailing and CODE_KEY in trailing:
                known = error_from_rpc(error)
                raise (TransferError(_FAILED) if isinstance(known, InternalError) else known) from error
            match error.code():
                case grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise DeadlineError("the prefill worker did not answer in time") from error
                case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:  # cancelled by a server that stops
                    raise self._gone() from error
                case status:
                    raise TransferError(f"the call to the prefill worker failed with {status.name}") from error
        except grpc.aio.UsageError as error:
            raise self._gone() from error  # the channel is closed
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise self._gone() from error  # the task was not cancelled: the channel was closed during the call
        finally:
            self._calls -= 1

    def _gone(self) -> PeerGoneError:
        is_news, self.is_gone = not self.is_gone, True
        if is_news and self._when_gone is not None:
            self._when_gone()
        return PeerGoneError("the prefill worker cannot be reached")


class KvTransferServicer(transfer_pb2_grpc.KvTransferServiceServicer):
    """Prefill's end. Checks every field, then calls `links` (which moves the bytes) or `holder` (which has the KV)."""

    def __init__(self, links: KvLinkServer, holder: KvHolder, clock: Clock) -> None:
        self._links = links
        self._holder = holder
        self._clock = clock

    async def Link(self, request: transfer_pb2.LinkRequest, context: Any) -> AsyncIterator[transfer_pb2.LinkResponse]:
        reply = await self._link(request, context)
        try:
            yield link_reply_to_pb(reply, PROTOCOL)
            await self._links.ended(reply.link_id)
        finally:
            self._links.unlink(reply.link_id)

    async def _link(self, request: transfer_pb2.LinkRequest, _: Any) -> LinkReply:
        _check_names(request.instance_id, request.fingerprint, request.boot_id)
        _require(len(request.transports) <= MAX_TRANSPORTS, "too many transports are offered")
        _require(len(request.kv_format) <= MAX_NAME_LENGTH, "a name is too long")
        if request.protocol != PROTOCOL:
            raise IncompatiblePeerError(_OTHER_VERSION)
        host = HostIdentity(request.boot_id, request.uid)
        transports = transports_from_pb(request.transports)
        return await self._links.link(
            LinkOffer(request.instance_id, request.fingerprint, host, transports, request.kv_format)
        )

    async def Calls(
        self, request_iterator: AsyncIterator[transfer_pb2.TransferCall], _: Any
    ) -> AsyncIterator[transfer_pb2.TransferAnswer]:
        async with aclosing(answer_calls(request_iterator, self._answer)) as answers:
            async for answer in answers:
                yield answer

    async def _answer(self, call: transfer_pb2.TransferCall) -> transfer_pb2.TransferAnswer:
        deadline_s = self._clock.now_s() + call.timeout_s
        match call.WhichOneof("call"):
            case "pull":
                return transfer_pb2.TransferAnswer(pulled=await self._pull(call.pull, deadline_s))
            case "pull_computed":
                return transfer_pb2.TransferAnswer(computed=await self._pull_computed(call.pull_computed, deadline_s))
            case "grant":
                return transfer_pb2.TransferAnswer(granted=await self._grant(call.grant))
            case "acknowledge":
                return transfer_pb2.TransferAnswer(acknowledged=await self._acknowledge(call.acknowledge))
            case _:
                raise InvalidRequestError("this version of tandem does not know the call")

    async def _pull(self, request: transfer_pb2.PullRequest, deadline_s: float) -> transfer_pb2.PullResponse:
        _check_names(request.request_id)
        return manifest_to_pb(await self._holder.manifest(request.request_id, request.epoch, deadline_s))

    async def _pull_computed(
        self, request: transfer_pb2.PullComputedRequest, deadline_s: float
    ) -> transfer_pb2.PullComputedResponse:
        _check_names(request.request_id)
        known = frontier_from_pb(request.known)
        _require(
            known.is_valid and len(known.later) < MAX_STAGES and request.min_new > 0,
            "what is known of the KV cannot be",
        )
        kv = await self._holder.computed(
            request.request_id, request.epoch, known, request.min_new, request.has_all, deadline_s
        )
        if isinstance(kv, Manifest):
            return transfer_pb2.PullComputedResponse(finished=manifest_to_pb(kv))
        return transfer_pb2.PullComputedResponse(computed=computed_to_pb(kv))

    async def _grant(self, request: transfer_pb2.GrantRequest) -> transfer_pb2.GrantResponse:
        _check_names(request.link_id, request.request_id)
        readable = self._holder.readable(request.request_id, request.epoch)
        reply = await self._links.send(grant_from_pb(request), readable)
        return transfer_pb2.GrantResponse(sent_bytes=reply.sent_bytes, checksum=reply.checksum)

    async def _acknowledge(self, request: transfer_pb2.AcknowledgeRequest) -> transfer_pb2.AcknowledgeResponse:
        _check_names(request.request_id)
        owned = await self._holder.acknowledge(request.request_id, request.epoch)
        return transfer_pb2.AcknowledgeResponse(owned=owned)

    async def RendezvousSet(
        self, request: transfer_pb2.RendezvousSetRequest, _: Any
    ) -> transfer_pb2.RendezvousSetResponse:
        _check_names(request.link_id, request.key)
        await self._links.rendezvous_set(request.link_id, request.key, request.value)
        return transfer_pb2.RendezvousSetResponse()

    async def RendezvousGet(
        self, request: transfer_pb2.RendezvousGetRequest, context: Any
    ) -> transfer_pb2.RendezvousGetResponse:
        _check_names(request.link_id, request.key)
        value = await self._links.rendezvous_get(request.link_id, request.key, _remaining_s(context))
        return transfer_pb2.RendezvousGetResponse(value=value)


def _remaining_s(context: Any) -> float:
    remaining_s: float | None = context.time_remaining()
    if remaining_s is None:
        raise InvalidRequestError("the call needs a deadline")
    return remaining_s


def _check_names(*names: str) -> None:
    _require(all(0 < len(name) <= MAX_NAME_LENGTH for name in names), "a name is missing or too long")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequestError(message)

"""The control channel of KV transfers: a client for decode instances (`PeerControl`), a servicer for prefill."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import grpc

from tandem.core.clock import Clock
from tandem.core.errors import DeadlineError, InternalError, InvalidRequestError, TandemError, TransferError
from tandem.core.kv_frontier import KvFrontier, StageFrontier, TransferChunk
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
    Transport,
)
from tandem.rpc_errors import CODE_KEY, error_from_rpc
from tandem.v1 import transfer_pb2, transfer_pb2_grpc
from tandem.wire.channels import token_metadata
from tandem.wire.convert import sampled_from_pb, sampled_to_pb
from tandem.wire.same_fields import from_message, to_message

MAX_NAME_LENGTH = 256
MAX_TRANSPORTS = 8
MAX_STAGES = 64

_TRANSPORT_TO_PB = {transport: getattr(transfer_pb2, f"TRANSPORT_{transport.name}") for transport in Transport}
_TRANSPORT_FROM_PB = {value: key for key, value in _TRANSPORT_TO_PB.items()}


class KvTransferClient:
    """A prefill instance as decode reaches it (`core.transfer.PeerControl`). The caller closes the channel.

    `token` is for a channel that was opened without one: interceptors slow down calls, and transfers wait for calls.
    """

    def __init__(self, channel: grpc.aio.Channel, instance_id: str, token: str | None = None) -> None:
        self._metadata = token_metadata(token)
        self._stub = transfer_pb2_grpc.KvTransferServiceStub(channel)
        self.instance_id = instance_id
        self.is_gone = False
        self._calls = 0  # in progress
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
            transports=[_TRANSPORT_TO_PB[transport] for transport in offer.transports],
            kv_format=offer.kv_format,
        )
        with self._call():
            call = self._stub.Link(request, metadata=self._metadata)
            try:
                async with asyncio.timeout(timeout_s):
                    reply = await call.read()
                transport = _TRANSPORT_FROM_PB.get(reply.transport) if reply is not grpc.aio.EOF else None
                if transport is None:
                    raise TransferError("the prefill worker's reply has no known transport")
            except BaseException as error:
                call.cancel()
                if isinstance(error, TimeoutError):
                    raise DeadlineError("the prefill worker did not answer in time") from error
                raise
        reading = asyncio.create_task(self._read_to_end(call), name=f"kv-link-{reply.link_id}")
        self._links[reply.link_id] = reading
        reading.add_done_callback(partial(self._link_ended, reply.link_id, call))
        return LinkReply(
            link_id=reply.link_id,
            instance_id=reply.instance_id,
            fingerprint=reply.fingerprint,
            transport=transport,
            num_blocks=reply.num_blocks,
            block_size=reply.block_size,
            tp=reply.tp,
            layers_per_stage=tuple(reply.layers_per_stage),
            socket_name=reply.socket_name,
            nonces=tuple(reply.nonces),
            kv_format=reply.kv_format,
        )

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
        return _manifest_from_pb(await self._unary(self._stub.Pull, request, timeout_s))

    async def pull_computed(
        self, request_id: str, epoch: int, known: KvFrontier, min_new: int, has_all: bool, timeout_s: float
    ) -> ComputedKv | Manifest:
        request = transfer_pb2.PullComputedRequest(
            request_id=request_id,
            epoch=epoch,
            known=_frontier_to_pb(known),
            min_new=min_new,
            has_all=has_all,
        )
        reply = await self._unary(self._stub.PullComputed, request, timeout_s)
        if reply.HasField("finished"):
            return _manifest_from_pb(reply.finished)
        computed = reply.computed
        return ComputedKv(
            request_id=computed.request_id,
            epoch=computed.epoch,
            block_ids=tuple(computed.block_ids),
            block_size=computed.block_size,
            frontier=_frontier_from_pb(computed.frontier),
        )

    async def grant(self, grant: Grant, timeout_s: float) -> GrantReply:
        request = transfer_pb2.GrantRequest(
            link_id=grant.link_id,
            request_id=grant.request_id,
            epoch=grant.epoch,
            sequence=grant.sequence,
            rank=grant.rank,
            allocation=grant.allocation,
            layers_begin=grant.part.layers.start,
            layers_end=grant.part.layers.stop,
            blocks_begin=grant.part.blocks.start,
            blocks_end=grant.part.blocks.stop,
            total_bytes=grant.total_bytes,
            chunk_bytes=grant.chunk_bytes,
            checksum=grant.checksum,
            num_tokens=grant.num_tokens,
        )
        reply = await self._unary(self._stub.Grant, request, timeout_s)
        return GrantReply(reply.sent_bytes, reply.checksum)

    async def acknowledge(self, request_id: str, epoch: int, timeout_s: float) -> bool:
        request = transfer_pb2.AcknowledgeRequest(request_id=request_id, epoch=epoch)
        reply = await self._unary(self._stub.Acknowledge, request, timeout_s)
        return bool(reply.owned)

    async def rendezvous_set(self, link_id: str, key: str, value: bytes, timeout_s: float) -> None:
        request = transfer_pb2.RendezvousSetRequest(link_id=link_id, key=key, value=value)
        await self._unary(self._stub.RendezvousSet, request, timeout_s)

    async def rendezvous_get(self, link_id: str, key: str, timeout_s: float) -> bytes:
        request = transfer_pb2.RendezvousGetRequest(link_id=link_id, key=key)
        reply = await self._unary(self._stub.RendezvousGet, request, timeout_s)
        return bytes(reply.value)

    async def _unary(self, method: Callable[..., Any], request: Any, timeout_s: float) -> Any:
        with self._call():
            return await method(request, timeout=max(0.0, timeout_s), metadata=self._metadata)

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Counts a call, and turns its errors into TandemErrors."""
        self._calls += 1
        try:
            yield
        except grpc.aio.AioRpcError as error:
            trailing = error.trailing_metadata()
            if trailing and CODE_KEY in trailing:
                known = error_from_rpc(error)
                if isinstance(known, InternalError):  # of that worker; another one may do
                    known = TransferError("the prefill worker failed; its log has the reason")
                raise known from error
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
        self.is_gone = True
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
            yield transfer_pb2.LinkResponse(
                link_id=reply.link_id,
                instance_id=reply.instance_id,
                fingerprint=reply.fingerprint,
                transport=_TRANSPORT_TO_PB[reply.transport],
                num_blocks=reply.num_blocks,
                block_size=reply.block_size,
                tp=reply.tp,
                layers_per_stage=reply.layers_per_stage,
                socket_name=reply.socket_name,
                nonces=reply.nonces,
                kv_format=reply.kv_format,
            )
            await self._links.ended(reply.link_id)
        finally:
            self._links.unlink(reply.link_id)

    async def _link(self, request: transfer_pb2.LinkRequest, _: Any) -> LinkReply:
        _check_names(request.instance_id, request.fingerprint, request.boot_id)
        _require(len(request.transports) <= MAX_TRANSPORTS, "too many transports are offered")
        _require(len(request.kv_format) <= MAX_NAME_LENGTH, "a name is too long")
        known = [_TRANSPORT_FROM_PB[number] for number in request.transports if number in _TRANSPORT_FROM_PB]
        host = HostIdentity(request.boot_id, request.uid)
        offer = LinkOffer(request.instance_id, request.fingerprint, host, tuple(known), request.kv_format)
        return await self._links.link(offer)

    async def Pull(self, request: transfer_pb2.PullRequest, context: Any) -> transfer_pb2.PullResponse:
        _check_names(request.request_id)
        return _manifest_to_pb(
            await self._holder.manifest(request.request_id, request.epoch, self._deadline_s(context))
        )

    async def PullComputed(
        self, request: transfer_pb2.PullComputedRequest, context: Any
    ) -> transfer_pb2.PullComputedResponse:
        _check_names(request.request_id)
        known = _frontier_from_pb(request.known)
        _require(
            known.is_valid and len(known.later) < MAX_STAGES and request.min_new > 0,
            "what is known of the KV cannot be",
        )
        kv = await self._holder.computed(
            request.request_id, request.epoch, known, request.min_new, request.has_all, self._deadline_s(context)
        )
        if isinstance(kv, Manifest):
            return transfer_pb2.PullComputedResponse(finished=_manifest_to_pb(kv))
        computed = transfer_pb2.ComputedKv(
            request_id=kv.request_id,
            epoch=kv.epoch,
            block_ids=kv.block_ids,
            block_size=kv.block_size,
            frontier=_frontier_to_pb(kv.frontier),
        )
        return transfer_pb2.PullComputedResponse(computed=computed)

    async def Grant(self, request: transfer_pb2.GrantRequest, context: Any) -> transfer_pb2.GrantResponse:
        _check_names(request.link_id, request.request_id)
        grant = Grant(
            link_id=request.link_id,
            request_id=request.request_id,
            epoch=request.epoch,
            sequence=request.sequence,
            rank=request.rank,
            allocation=request.allocation,
            part=TransferChunk(
                range(request.layers_begin, request.layers_end), range(request.blocks_begin, request.blocks_end)
            ),
            total_bytes=request.total_bytes,
            chunk_bytes=request.chunk_bytes,
            checksum=request.checksum,
            num_tokens=request.num_tokens,
        )
        reply = await self._links.send(grant, self._holder.readable(request.request_id, request.epoch))
        return transfer_pb2.GrantResponse(sent_bytes=reply.sent_bytes, checksum=reply.checksum)

    async def Acknowledge(self, request: transfer_pb2.AcknowledgeRequest, _: Any) -> transfer_pb2.AcknowledgeResponse:
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

    def _deadline_s(self, context: Any) -> float:
        return self._clock.now_s() + _remaining_s(context)


def _manifest_to_pb(manifest: Manifest) -> transfer_pb2.PullResponse:
    return transfer_pb2.PullResponse(
        request_id=manifest.request_id,
        epoch=manifest.epoch,
        num_tokens=manifest.num_tokens,
        token_hash=manifest.token_hash,
        block_ids=manifest.block_ids,
        fingerprint=manifest.fingerprint,
        block_size=manifest.block_size,
        first_token=sampled_to_pb(manifest.first_token),
        allocation=manifest.allocation,
    )


def _manifest_from_pb(reply: transfer_pb2.PullResponse) -> Manifest:
    return Manifest(
        request_id=reply.request_id,
        epoch=reply.epoch,
        num_tokens=reply.num_tokens,
        token_hash=reply.token_hash,
        block_ids=tuple(reply.block_ids),
        fingerprint=reply.fingerprint,
        block_size=reply.block_size,
        first_token=sampled_from_pb(reply.first_token),
        allocation=reply.allocation,
    )


def _frontier_to_pb(frontier: KvFrontier) -> transfer_pb2.KvFrontier:
    return transfer_pb2.KvFrontier(
        allocation=frontier.allocation,
        blocks=frontier.blocks,
        next_blocks=frontier.next_blocks,
        layers=frontier.layers,
        num_layers=frontier.num_layers,
        later=[to_message(transfer_pb2.StageFrontier, stage) for stage in frontier.later],
    )


def _frontier_from_pb(pb: transfer_pb2.KvFrontier) -> KvFrontier:
    later = tuple(from_message(StageFrontier, stage) for stage in pb.later)
    return KvFrontier(pb.allocation, pb.blocks, pb.next_blocks, pb.layers, pb.num_layers, later)


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

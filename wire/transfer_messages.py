"""Messages of the KV transfer's control channel <-> values of `core.transfer`."""

from collections.abc import Iterable
from typing import Any

from tandem.core.errors import TransferError
from tandem.core.kv_frontier import KvFrontier, StageFrontier, TransferChunk
from tandem.core.transfer import ComputedKv, Grant, LinkReply, Manifest, Transport
from tandem.v1 import transfer_pb2
from tandem.wire.convert import sampled_from_pb, sampled_to_pb
from tandem.wire.same_fields import from_message, to_message

_TRANSPORT_TO_PB = {transport: getattr(transfer_pb2, f"TRANSPORT_{transport.name}") for transport in Transport}
_TRANSPORT_FROM_PB = {value: key for key, value in _TRANSPORT_TO_PB.items()}


def transports_to_pb(transports: Iterable[Transport]) -> list[Any]:
    return [_TRANSPORT_TO_PB[transport] for transport in transports]


def transports_from_pb(numbers: Iterable[Any]) -> tuple[Transport, ...]:
    """Without those that this version does not know."""
    return tuple(_TRANSPORT_FROM_PB[number] for number in numbers if number in _TRANSPORT_FROM_PB)


def link_reply_to_pb(reply: LinkReply, protocol: int) -> transfer_pb2.LinkResponse:
    transport = _TRANSPORT_TO_PB[reply.transport]
    return to_message(transfer_pb2.LinkResponse, reply, transport=transport, protocol=protocol)


def link_reply_from_pb(reply: transfer_pb2.LinkResponse) -> LinkReply:
    """Raises TransferError for a transport that this version does not know."""
    transport = _TRANSPORT_FROM_PB.get(reply.transport)
    if transport is None:
        raise TransferError("the prefill worker's reply has no known transport")
    return from_message(LinkReply, reply, transport=transport)


def grant_to_pb(grant: Grant) -> transfer_pb2.GrantRequest:
    return transfer_pb2.GrantRequest(
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


def grant_from_pb(request: transfer_pb2.GrantRequest) -> Grant:
    part = TransferChunk(
        range(request.layers_begin, request.layers_end), range(request.blocks_begin, request.blocks_end)
    )
    return from_message(Grant, request, part=part)


def computed_to_pb(kv: ComputedKv) -> transfer_pb2.ComputedKv:
    return to_message(transfer_pb2.ComputedKv, kv, frontier=frontier_to_pb(kv.frontier))


def computed_from_pb(computed: transfer_pb2.ComputedKv) -> ComputedKv:
    return from_message(ComputedKv, computed, frontier=frontier_from_pb(computed.frontier))


def manifest_to_pb(manifest: Manifest) -> transfer_pb2.PullResponse:
    return to_message(transfer_pb2.PullResponse, manifest, first_token=sampled_to_pb(manifest.first_token))


def manifest_from_pb(reply: transfer_pb2.PullResponse) -> Manifest:
    return from_message(Manifest, reply, first_token=sampled_from_pb(reply.first_token))


def frontier_to_pb(frontier: KvFrontier) -> transfer_pb2.KvFrontier:
    later = [to_message(transfer_pb2.StageFrontier, stage) for stage in frontier.later]
    return to_message(transfer_pb2.KvFrontier, frontier, later=later)


def frontier_from_pb(pb: transfer_pb2.KvFrontier) -> KvFrontier:
    return from_message(KvFrontier, pb, later=tuple(from_message(StageFrontier, stage) for stage in pb.later))

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
    return transfer_pb2.LinkResponse(
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
        protocol=protocol,
    )


def link_reply_from_pb(reply: transfer_pb2.LinkResponse) -> LinkReply:
    """Raises TransferError for a transport that this version does not know."""
    transport = _TRANSPORT_FROM_PB.get(reply.transport)
    if transport is None:
        raise TransferError("the prefill worker's reply has no known transport")
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
    return Grant(
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


def computed_to_pb(kv: ComputedKv) -> transfer_pb2.ComputedKv:
    return transfer_pb2.ComputedKv(
        request_id=kv.request_id,
        epoch=kv.epoch,
        block_ids=kv.block_ids,
        block_size=kv.block_size,
        frontier=frontier_to_pb(kv.frontier),
    )


def computed_from_pb(computed: transfer_pb2.ComputedKv) -> ComputedKv:
    return ComputedKv(
        request_id=computed.request_id,
        epoch=computed.epoch,
        block_ids=tuple(computed.block_ids),
        block_size=computed.block_size,
        frontier=frontier_from_pb(computed.frontier),
    )


def manifest_to_pb(manifest: Manifest) -> transfer_pb2.PullResponse:
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


def manifest_from_pb(reply: transfer_pb2.PullResponse) -> Manifest:
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


def frontier_to_pb(frontier: KvFrontier) -> transfer_pb2.KvFrontier:
    return transfer_pb2.KvFrontier(
        allocation=frontier.allocation,
        blocks=frontier.blocks,
        next_blocks=frontier.next_blocks,
        layers=frontier.layers,
        num_layers=frontier.num_layers,
        later=[to_message(transfer_pb2.StageFrontier, stage) for stage in frontier.later],
    )


def frontier_from_pb(pb: transfer_pb2.KvFrontier) -> KvFrontier:
    later = tuple(from_message(StageFrontier, stage) for stage in pb.later)
    return KvFrontier(pb.allocation, pb.blocks, pb.next_blocks, pb.layers, pb.num_layers, later)

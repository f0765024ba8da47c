"""Measures how long KV takes between instances of two shapes or block sizes on this machine.

Sender and receiver are those of instances, over shared memory. Both are in this process, and so is the control channel:
its messages cost the same for all shapes, and the request path has them already.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median

from tandem.core.errors import InternalError
from tandem.core.kv_frontier import KvFrontier
from tandem.core.kv_layout import KvLayout
from tandem.core.request import SampledToken
from tandem.core.transfer import ComputedKv, Grant, GrantReply, LinkOffer, LinkReply, Manifest, hash_token_ids
from tandem.engine.ops.piece_copy import native_copy_pieces
from tandem.kv_transfer.arrival import CopyPieces
from tandem.kv_transfer.pool import SharedPool
from tandem.kv_transfer.receiver import KvReceiver
from tandem.kv_transfer.sender import KvSender
from tandem.placement.costs.rank_messages import MessageTime, fit_message_cost
from tandem.placement.costs.resharding import KvShape, KvTransfer

_SIZES = (64, 256, 1024)  # tokens
_POOL_TOKENS = 2048
_REPETITIONS = 7  # the first one does not count
_OTHER_BLOCK_SIZE = 2  # times that of the instances
_TIMEOUT_S = 60.0


def measure_transfers(
    layouts: Sequence[KvLayout], ops: str, progress: Callable[[float], None] = lambda share: None
) -> list[KvTransfer]:
    """Between any two of `layouts`, the first of which is of one rank, and between two of one rank with unequal blocks.
    All are of one model in the memory of the host, computed by `ops`. Raises a TandemError."""
    first = layouts[0]
    assert first.num_ranks == 1
    larger = replace(first, block_size=_OTHER_BLOCK_SIZE * first.block_size)
    pairs = [(source, destination) for source in layouts for destination in layouts]
    pairs += [(first, larger), (larger, first)]
    copy_pieces = native_copy_pieces() if ops.startswith("native") else None
    found = []
    for source, destination in pairs:
        found.append(asyncio.run(_measure_pair(_sized(source), _sized(destination), copy_pieces)))
        progress(len(found) / len(pairs))
    return found


def _sized(layout: KvLayout) -> KvLayout:
    return replace(layout, num_blocks=layout.blocks_for(_POOL_TOKENS))


async def _measure_pair(source: KvLayout, destination: KvLayout, copy_pieces: CopyPieces | None) -> KvTransfer:
    with ExitStack() as resources:
        source_pools, own_pools = (list(_pools(layout, resources)) for layout in (source, destination))
        sender = KvSender(source, source_pools, "source")
        receiver = KvReceiver(
            destination,
            [pool.tensor for pool in own_pools],
            "destination",
            checksum=False,
            copy_pieces=copy_pieces,
        )
        peer = _PeerInProcess(sender, source)
        try:
            times = []
            for num_tokens in _SIZES:
                seconds = [await _fetch_s(receiver, peer, destination, num_tokens) for _ in range(_REPETITIONS)]
                num_bytes = round(num_tokens * source.block_bytes / source.block_size)
                times.append(MessageTime(num_bytes=num_bytes, seconds=median(seconds[1:])))
        finally:
            await receiver.close()
            await sender.close()
    cost = fit_message_cost(times)
    return KvTransfer(source=_kv_shape(source), destination=_kv_shape(destination), cost=cost, times=tuple(times))


def _pools(layout: KvLayout, resources: ExitStack) -> Iterator[SharedPool]:
    for rank in range(layout.num_ranks):
        pool = SharedPool.create(layout.pool_of(rank).pool_bytes)
        resources.callback(pool.close)
        yield pool


async def _fetch_s(receiver: KvReceiver, peer: "_PeerInProcess", layout: KvLayout, num_tokens: int) -> float:
    """From the manifest to the acknowledgement, into blocks anywhere in the pool."""
    block_ids = random.Random(num_tokens).sample(range(layout.num_blocks), layout.blocks_for(num_tokens))
    fetched = await receiver.fetch(
        peer, str(num_tokens), 0, range(num_tokens), block_ids, time.monotonic() + _TIMEOUT_S
    )
    return fetched.seconds


def _kv_shape(layout: KvLayout) -> KvShape:
    return KvShape(tp=layout.tp, pp=max(1, len(layout.layers_per_stage)), block_size=layout.block_size)


@dataclass(slots=True)
class _PeerInProcess:
    """Implements `core.transfer.PeerControl` without a channel. Every prompt is computed; a request's id is its number
    of tokens."""

    sender: KvSender
    layout: KvLayout
    instance_id: str = "source"
    is_gone: bool = False

    async def link(self, offer: LinkOffer, timeout_s: float) -> LinkReply:
        return await self.sender.link(offer)

    def is_linked(self, link_id: str) -> bool:
        return True

    def when_unlinked(self, link_id: str, callback: Callable[[], None]) -> None:
        """The link lasts as long as the receiver."""

    def unlink(self, link_id: str) -> None:
        self.sender.unlink(link_id)

    async def pull(self, request_id: str, epoch: int, timeout_s: float) -> Manifest:
        num_tokens = int(request_id)
        num_blocks = self.layout.blocks_for(num_tokens)
        return Manifest(
            request_id=request_id,
            epoch=epoch,
            num_tokens=num_tokens,
            token_hash=hash_token_ids(range(num_tokens)),
            block_ids=tuple(random.Random(num_tokens).sample(range(self.layout.num_blocks), num_blocks)),
            fingerprint=self.layout.fingerprint,
            block_size=self.layout.block_size,
            first_token=SampledToken(0),
        )

    async def pull_computed(
        self, request_id: str, epoch: int, known: KvFrontier, min_new: int, has_all: bool, timeout_s: float
    ) -> ComputedKv | Manifest:
        raise InternalError("nothing is streamed here")

    async def grant(self, grant: Grant, timeout_s: float) -> GrantReply:
        raise InternalError("nothing is sent over shared memory")

    async def acknowledge(self, request_id: str, epoch: int, timeout_s: float) -> bool:
        return True

    async def rendezvous_set(self, link_id: str, key: str, value: bytes, timeout_s: float) -> None:
        await self.sender.rendezvous_set(link_id, key, value)

    async def rendezvous_get(self, link_id: str, key: str, timeout_s: float) -> bytes:
        return await self.sender.rendezvous_get(link_id, key, timeout_s)

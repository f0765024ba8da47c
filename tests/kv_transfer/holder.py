"""A prefill worker without an engine: finished attempts, and a server in this or another process."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import torch

from tandem.core.clock import SystemClock
from tandem.core.errors import DeadlineError, StaleEpochError
from tandem.core.kv_frontier import KvFrontier
from tandem.core.kv_layout import KvLayout
from tandem.core.request import SampledToken
from tandem.core.transfer import ComputedKv, Manifest, hash_token_ids
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.pool import SharedPool
from tandem.kv_transfer.sender import KvSender
from tandem.v1 import transfer_pb2_grpc
from tandem.wire.channels import open_channel
from tandem.wire.server import bind, build_server
from tandem.wire.transfer import KvTransferClient, KvTransferServicer

LAYOUT = KvLayout(
    num_layers=3, num_blocks=40, num_kv_heads=2, block_size=4, head_dim=8, dtype="bfloat16", weights_hash="w"
)


def tokens(num_blocks: int, layout: KvLayout = LAYOUT) -> tuple[int, ...]:
    """Token ids that fill that many blocks, the last one not quite."""
    return tuple(range(100, 100 + num_blocks * layout.block_size - 1))


def blocks_of(pool: torch.Tensor, layout: KvLayout, block_ids: list[int]) -> torch.Tensor:
    """Their bytes, in the order [layer, kv, position, ...]."""
    shaped = pool.view(torch.uint8)[: layout.pool_bytes].view(layout.num_layers, 2, layout.num_blocks, -1)
    return shaped[:, :, block_ids]


class FakeHolder:
    """`core.transfer.KvHolder` over a dictionary. `announce` says what is computed, `finish` ends an attempt's prefill;
    once `lease_lost` is set, acknowledgements come too late."""

    def __init__(self, layout: KvLayout) -> None:
        self._layout = layout
        self._finished: dict[tuple[str, int], asyncio.Future[Manifest]] = {}
        self._computed: dict[tuple[str, int], ComputedKv] = {}
        self._announced = asyncio.Condition()
        self.known: list[KvFrontier] = []  # by readers, when they asked
        self.acknowledged: list[tuple[str, int]] = []
        self.lease_lost = False

    def _slot(self, request_id: str, epoch: int) -> "asyncio.Future[Manifest]":
        return self._finished.setdefault((request_id, epoch), asyncio.get_running_loop().create_future())

    async def announce(self, request_id: str, epoch: int, block_ids: list[int], frontier: KvFrontier) -> None:
        async with self._announced:
            self._computed[request_id, epoch] = ComputedKv(
                request_id, epoch, tuple(block_ids), self._layout.block_size, frontier
            )
            self._announced.notify_all()

    def finish(self, request_id: str, epoch: int, block_ids: list[int], allocation: int = 0) -> Manifest:
        token_ids = tokens(len(block_ids), self._layout)
        manifest = Manifest(
            request_id=request_id,
            epoch=epoch,
            num_tokens=len(token_ids),
            token_hash=hash_token_ids(token_ids),
            block_ids=tuple(block_ids),
            fingerprint=self._layout.fingerprint,
            block_size=self._layout.block_size,
            first_token=SampledToken(7),
            allocation=allocation,
        )
        self._slot(request_id, epoch).set_result(manifest)
        return manifest

    def alter(self, request_id: str, epoch: int, changes: dict[str, object]) -> None:
        """Make an attempt's manifest lie."""
        altered = replace(self._slot(request_id, epoch).result(), **changes)  # type: ignore[arg-type]
        self._finished[(request_id, epoch)] = asyncio.get_running_loop().create_future()
        self._finished[(request_id, epoch)].set_result(altered)

    async def manifest(self, request_id: str, epoch: int, deadline_s: float) -> Manifest:
        if any(name == request_id and current > epoch for name, current in self._finished):
            raise StaleEpochError("given up")
        try:
            async with asyncio.timeout(deadline_s - SystemClock().now_s()):
                return await asyncio.shield(self._slot(request_id, epoch))
        except TimeoutError as error:
            raise DeadlineError("not finished in time") from error

    async def computed(
        self, request_id: str, epoch: int, known: KvFrontier, min_new: int, has_all: bool, deadline_s: float
    ) -> ComputedKv | Manifest:
        """Whatever is new, or the manifest."""
        self.known.append(known)
        finished: asyncio.Future[ComputedKv | Manifest]
        finished = asyncio.ensure_future(self.manifest(request_id, epoch, deadline_s))
        announced: asyncio.Future[ComputedKv | Manifest]
        announced = asyncio.ensure_future(self._news(request_id, epoch, known))
        try:
            await asyncio.wait((finished, announced), return_when=asyncio.FIRST_COMPLETED)
            kv = (finished if finished.done() else announced).result()
            is_taken = has_all and isinstance(kv, Manifest) and kv.allocation == known.allocation
            if is_taken and not await self.acknowledge(request_id, epoch):
                raise StaleEpochError("given up")
            return kv
        finally:
            finished.cancel()
            announced.cancel()

    async def _news(self, request_id: str, epoch: int, known: KvFrontier) -> ComputedKv | Manifest:
        async with self._announced:
            while (kv := self._computed.get((request_id, epoch))) is None or kv.frontier == known:
                await self._announced.wait()
            return kv

    def readable(self, request_id: str, epoch: int) -> ComputedKv | Manifest:
        slot = self._slot(request_id, epoch)
        if slot.done():
            return slot.result()
        if (kv := self._computed.get((request_id, epoch))) is None:
            raise StaleEpochError("nothing is computed")
        return kv

    async def acknowledge(self, request_id: str, epoch: int) -> bool:
        if self.lease_lost or self._finished.pop((request_id, epoch), None) is None:
            return False
        self.acknowledged.append((request_id, epoch))
        return True


@dataclass
class Prefill:
    """A served prefill side and decode's way to reach it. `pools` has one for each rank of the layout."""

    layout: KvLayout
    pools: list[SharedPool]
    holder: FakeHolder
    sender: KvSender
    peer: KvTransferClient
    address: str
    stop: Callable[[], Awaitable[None]]

    @property
    def pool(self) -> SharedPool:
        """Of the only rank."""
        (pool,) = self.pools
        return pool


@asynccontextmanager
async def serve_prefill(
    layout: KvLayout = LAYOUT,
    *,
    config: LinkConfig | None = None,
    instance_id: str = "prefill-0",
    holder: FakeHolder | None = None,
) -> AsyncIterator[Prefill]:
    pools = [SharedPool.create(layout.pool_of(rank).pool_bytes) for rank in range(layout.num_ranks)]
    for rank, pool in enumerate(pools):
        pool.tensor.random_(0, 256, generator=torch.Generator().manual_seed(rank))
    holder, sender = holder or FakeHolder(layout), KvSender(layout, pools, instance_id, config)
    server, _ = build_server()
    servicer = KvTransferServicer(sender, holder, SystemClock())
    transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(servicer, server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    channel = open_channel(address)
    try:
        peer = KvTransferClient(channel, instance_id)
        yield Prefill(layout, pools, holder, sender, peer, address, lambda: server.stop(None))
    finally:
        await channel.close()
        await server.stop(None)
        await sender.close()
        for pool in pools:
            pool.close()

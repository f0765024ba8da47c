"""Prefill's side of KV transfers: makes links with decode instances, and sends exactly the granted bytes.

It knows no request: the worker (a `KvHolder`) says which blocks a manifest names, and when they may be reused.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.core.errors import IncompatiblePeerError, OverloadedError, StaleEpochError, TransferError
from tandem.core.kv_codec import KvCodec, named_format
from tandem.core.kv_frontier import TransferChunk
from tandem.core.kv_layout import KvLayout
from tandem.core.session import LinkStats
from tandem.core.transfer import (
    LAYOUTS_DIFFER,
    ComputedKv,
    Grant,
    GrantReply,
    LinkOffer,
    LinkReply,
    Manifest,
    Transport,
    unknown_format,
)
from tandem.kv_transfer.block_coder import BlockCoder, KvCodes
from tandem.kv_transfer.blocks import LeavingBlocks
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.descriptors import DescriptorServer, host_identity
from tandem.kv_transfer.link_totals import LinkTotals
from tandem.kv_transfer.pool import SharedPool
from tandem.kv_transfer.process_group_link import ProcessGroupFactory, ProcessGroupLink
from tandem.kv_transfer.process_groups import PREFILL_RANK
from tandem.kv_transfer.remote_pool import RemotePool, view_over
from tandem.kv_transfer.rendezvous import LocalRendezvousStore
from tandem.kv_transfer.reshard import within

_log = logging.getLogger(__name__)

MAX_CHUNK_BYTES = 64 << 20  # in memory


@dataclass(slots=True)
class _SendLink:
    """A link to one decode instance. Over shared memory it has no process group: decode copies by itself."""

    link_id: str
    peer_id: str
    store: LocalRendezvousStore
    codec: KvCodec = KvCodec.NONE
    group: ProcessGroupLink | None = None
    next_sequence: int = 0
    sending: int = 0
    used_s: float = field(default_factory=time.monotonic)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class KvSender:
    """The prefill end of all links of an instance (`core.transfer.KvLinkServer`). Lives on the event loop; bytes move
    in the links' threads. `pools`, one per rank, stay the caller's, and must outlive the sender.
    """

    def __init__(
        self,
        layout: KvLayout,
        pools: Sequence[SharedPool | RemotePool],
        instance_id: str,
        config: LinkConfig | None = None,
        codes: KvCodes | None = None,
    ) -> None:
        """`codes`: see `BlockCoder`."""
        self._layout = layout
        self._codes = codes
        self._pools = pools
        self._instance_id = instance_id
        self._config = config or LinkConfig()
        assert isinstance(pools[0], SharedPool), "the first pool is on this host"
        self._groups = ProcessGroupFactory(pools[0].tensor.device, self._config)
        self._links: dict[str, _SendLink] = {}
        self._totals = LinkTotals(self._config.max_links)
        self._descriptors: DescriptorServer | None = None
        self._closing: list[ProcessGroupLink] = []  # closed ones whose threads may still run

    async def link(self, offer: LinkOffer) -> LinkReply:
        """Agree on a transport with a decode instance. An earlier link of the same instance ends.

        Raises IncompatiblePeerError (another format, an unknown codec, or no transport in common) or OverloadedError
        (too many links).
        """
        if offer.fingerprint != self._layout.fingerprint:
            raise IncompatiblePeerError(LAYOUTS_DIFFER)
        possible = self._transports(offer)
        transport = next((transport for transport in offer.transports if transport in possible), None)
        if transport is None:
            raise IncompatiblePeerError("the two workers have no transport for KV in common")
        codec = KvCodec.NONE if transport is Transport.SHARED_MEMORY else named_format(offer.kv_format)
        if codec is None:
            raise unknown_format(offer.kv_format)
        self.drop(offer.instance_id)
        self._evict_idle_link()
        store = LocalRendezvousStore(self._config.link_timeout_s)
        link = _SendLink(secrets.token_hex(16), offer.instance_id, store, codec)
        socket_name = ""
        nonces: tuple[bytes, ...] = ()
        if transport is Transport.SHARED_MEMORY:
            fds = [pool.fd for pool in self._pools if pool.fd is not None]
            self._descriptors = self._descriptors or DescriptorServer.start(fds)
            socket_name, nonces = self._descriptors.name, tuple(map(self._descriptors.issue_nonce, range(len(fds))))
        else:
            name = f"kv-send-{offer.instance_id}"
            link.group = ProcessGroupLink.start(self._groups, self._config, PREFILL_RANK, store, name)
        self._links[link.link_id] = link
        self._totals.linked(offer.instance_id, transport, codec)
        return LinkReply(
            link_id=link.link_id,
            instance_id=self._instance_id,
            fingerprint=self._layout.fingerprint,
            transport=transport,
            num_blocks=self._layout.num_blocks,
            block_size=self._layout.block_size,
            tp=self._layout.tp,
            layers_per_stage=self._layout.layers_per_stage,
            socket_name=socket_name,
            nonces=nonces,
            kv_format=codec.format_name,
        )

    async def ended(self, link_id: str) -> None:
        """Return when the link has ended on this side."""
        if link := self._links.get(link_id):
            await link.ended.wait()

    def unlink(self, link_id: str) -> None:
        """End a link; without effect when it has ended."""
        if link := self._links.pop(link_id, None):
            link.ended.set()
            if link.group is not None:
                link.group.close()
                self._closing = [group for group in self._closing if not group.join(0.0)] + [link.group]

    async def send(self, grant: Grant, kv: ComputedKv | Manifest) -> GrantReply:
        """Send what the granted rank holds of the granted part, and nothing else. Without a process group nothing is
        sent, and the reply has the checksum of a finished prefill's KV.

        Raises StaleEpochError or TransferError. A process group that failed, or whose send was cancelled, ends its
        link. A link over shared memory goes on: nothing was sent over it.
        """
        link = self._links.get(grant.link_id)
        if link is None:
            raise TransferError("the KV link has ended")
        transfer = self._granted(link, grant, kv)
        link.sending += 1
        try:
            if link.group is not None:
                return await self._send(link, link.group, grant, transfer)
            if not grant.checksum or isinstance(kv, ComputedKv):
                return GrantReply(0, 0)
            return GrantReply(0, await asyncio.to_thread(transfer.checksum))
        finally:
            link.sending -= 1
            link.used_s = time.monotonic()

    async def _send(
        self, link: _SendLink, group: ProcessGroupLink, grant: Grant, transfer: LeavingBlocks
    ) -> GrantReply:
        link.next_sequence += 1
        started_s = time.monotonic()
        try:
            await group.ready()
            checksum = await group.send(transfer, grant.checksum)
        except BaseException:
            self._totals.add(link.peer_id, failures=1)
            self.unlink(link.link_id)
            raise
        seconds = time.monotonic() - started_s
        self._totals.add(
            link.peer_id, transfers=1, nbytes=transfer.kv_bytes, seconds=seconds, wire_bytes=transfer.wire_bytes
        )
        return GrantReply(grant.total_bytes, checksum)

    async def rendezvous_set(self, link_id: str, key: str, value: bytes) -> None:
        """Raises TransferError."""
        self._store(link_id).put(key, value)

    async def rendezvous_get(self, link_id: str, key: str, timeout_s: float) -> bytes:
        """Raises TransferError."""
        return await self._store(link_id).read_async(key, timeout_s)

    def links(self) -> tuple[LinkStats, ...]:
        """Totals per peer (see `LinkTotals`). Over shared memory decode counts the bytes."""
        return self._totals.stats()

    def drop(self, peer_id: str) -> None:
        """End the links of that instance."""
        for link in [link for link in self._links.values() if link.peer_id == peer_id]:
            self.unlink(link.link_id)

    async def close(self) -> None:
        """End all links and wait for their threads, in all at most as long as an operation may take."""
        for link_id in list(self._links):
            self.unlink(link_id)
        end_s = time.monotonic() + self._config.operation_timeout_s(MAX_CHUNK_BYTES)
        for group in self._closing:
            if not await asyncio.to_thread(group.join, max(0.0, end_s - time.monotonic())):
                _log.warning("a KV link's thread still hangs")
        self._closing.clear()
        self._groups.close()
        if self._descriptors is not None:
            self._descriptors.close()
            self._descriptors = None

    def _transports(self, offer: LinkOffer) -> set[Transport]:
        transports = {self._groups.transport}
        if all(pool.fd is not None for pool in self._pools) and offer.host == host_identity():
            transports.add(Transport.SHARED_MEMORY)
        return transports

    def _evict_idle_link(self) -> None:
        if len(self._links) < self._config.max_links:
            return
        idle = [link for link in self._links.values() if not link.sending]
        if not idle:
            raise OverloadedError("too many KV links are busy")
        self.unlink(min(idle, key=lambda link: link.used_s).link_id)

    def _store(self, link_id: str) -> LocalRendezvousStore:
        if link := self._links.get(link_id):
            return link.store
        raise TransferError("the KV link has ended")

    def _granted(self, link: _SendLink, grant: Grant, kv: ComputedKv | Manifest) -> LeavingBlocks:
        """The bytes to send, after checking that they are computed, and that decode expects as many."""
        frontier = kv.frontier if isinstance(kv, ComputedKv) else kv.frontier(self._layout.num_layers)
        if (kv.request_id, kv.epoch, frontier.allocation) != (grant.request_id, grant.epoch, grant.allocation):
            raise StaleEpochError("the grant belongs to another attempt")
        if (
            grant.sequence != link.next_sequence
            or not 0 <= grant.rank < self._layout.num_ranks
            or not 0 < grant.chunk_bytes <= MAX_CHUNK_BYTES
        ):
            raise TransferError("the grant does not fit the link")
        layers, blocks = grant.part
        if not (0 <= layers.start < layers.stop and 0 <= blocks.start < blocks.stop and frontier.covers(grant.part)):
            raise TransferError("the grant is for KV that is not computed")
        part = TransferChunk(within(layers, self._layout.layers(grant.rank)), blocks)
        pool, layout = self._pools[grant.rank], self._layout.pool_of(grant.rank)
        num_tokens = grant.num_tokens if isinstance(kv, ComputedKv) else kv.num_tokens
        coder = None if link.codec is KvCodec.NONE else BlockCoder(link.codec, layout, self._codes)
        if coder is None and isinstance(kv, ComputedKv):
            num_tokens = len(kv.block_ids) * layout.block_size  # an older reader does not tell
        if layout.blocks_for(num_tokens) != len(kv.block_ids):
            raise TransferError("the grant is for another number of tokens")
        source = view_over(pool if isinstance(pool, RemotePool) else pool.tensor, layout)
        transfer = LeavingBlocks(source, layout, kv.block_ids, num_tokens, grant.chunk_bytes, part, coder)
        if grant.total_bytes != transfer.wire_bytes:
            raise TransferError("the grant is not for exactly the bytes of its part")
        return transfer

"""Prefill's side of the hand-over: answers link-ups, and sends exactly what decode grants.

It knows no request: the worker (a `KvHolder`) says which blocks a manifest names, and when they may be reused.
"""

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass, field

from tandem.core.errors import IncompatiblePeerError, OverloadedError, StaleEpochError, TransferError
from tandem.core.kv_layout import KvLayout
from tandem.core.session import LinkStats
from tandem.core.shipment import Manifest
from tandem.core.transfer import Grant, GrantReply, LinkOffer, LinkReply, Transport
from tandem.kv_transfer.blocks import PoolView, Window, gather_checksum, windows
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.descriptors import DescriptorServer, host_identity
from tandem.kv_transfer.group_links import GroupLink, PairMaker
from tandem.kv_transfer.pair import PREFILL_RANK
from tandem.kv_transfer.pool import SharedPool
from tandem.kv_transfer.rendezvous import LocalBoard
from tandem.kv_transfer.totals import LinkTotals

_log = logging.getLogger(__name__)

MAX_WINDOW_BYTES = 64 << 20


@dataclass(slots=True)
class _Link:
    link_id: str
    peer_id: str
    transport: Transport
    board: LocalBoard = field(default_factory=LocalBoard)
    group: GroupLink | None = None
    next_sequence: int = 0
    sending: int = 0
    used_s: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class KvSender:
    """The prefill end of all links of one rank (`core.transfer.KvLinkServer`). Lives on the event loop.

    `pool` stays the caller's, and must outlive the sender.
    """

    def __init__(self, layout: KvLayout, pool: SharedPool, instance_id: str, config: LinkConfig | None = None) -> None:
        self._layout = layout
        self._pool = pool
        self._instance_id = instance_id
        self._config = config or LinkConfig()
        self._pairs = PairMaker(pool.tensor.device, self._config)
        self._links: dict[str, _Link] = {}
        self._totals: dict[str, LinkTotals] = {}
        self._descriptors: DescriptorServer | None = None
        self._killed: list[GroupLink] = []

    async def link(self, offer: LinkOffer) -> LinkReply:
        """Agree on a transport with a decode instance. An earlier link of the same instance ends.

        Raises IncompatiblePeerError (another layout, or no transport in common) or OverloadedError (too many links).
        """
        if offer.fingerprint != self._layout.fingerprint:
            raise IncompatiblePeerError("the two workers' KV layouts differ (model weights, dtype or block size)")
        possible = self._transports(offer)
        transport = next((transport for transport in offer.transports if transport in possible), None)
        if transport is None:
            raise IncompatiblePeerError("the two workers have no transport for KV in common")
        self.drop(offer.instance_id)
        self._make_room()
        link = _Link(secrets.token_hex(16), offer.instance_id, transport, used_s=time.monotonic())
        socket_name, nonce = "", b""
        if transport is Transport.SHARED_MEMORY:
            assert self._pool.fd is not None
            self._descriptors = self._descriptors or DescriptorServer.start(self._pool.fd)
            socket_name, nonce = self._descriptors.name, self._descriptors.invite()
        else:
            name = f"kv-send-{offer.instance_id}"
            link.group = GroupLink.start(self._pairs, self._config, PREFILL_RANK, link.board, name)
        self._links[link.link_id] = link
        self._totals.setdefault(offer.instance_id, LinkTotals(offer.instance_id, transport)).transport = transport
        return LinkReply(
            link_id=link.link_id,
            instance_id=self._instance_id,
            fingerprint=self._layout.fingerprint,
            transport=transport,
            num_blocks=self._layout.num_blocks,
            socket_name=socket_name,
            nonce=nonce,
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
                link.group.kill()
                self._killed = [group for group in self._killed if not group.join(0.0)] + [link.group]

    async def send(self, grant: Grant, manifest: Manifest) -> GrantReply:
        """Send the granted portion of a manifest's blocks, and nothing else.

        Raises TransferError (the link is dead then) or StaleEpochError.
        """
        link = self._links.get(grant.link_id)
        if link is None:
            raise TransferError("the KV link has ended")
        plan, view = self._plan(link, grant, manifest)
        link.next_sequence += 1
        link.sending += 1
        started_s = time.perf_counter()
        totals = self._totals[link.peer_id]
        try:
            if link.group is None:
                checksum = 0
                if grant.checksum:
                    checksum = await asyncio.to_thread(gather_checksum, view, manifest.block_ids, plan)
                return GrantReply(0, checksum)
            await link.group.ready()
            checksum = await link.group.send(view, manifest.block_ids, plan, grant.checksum)
            totals.count(grant.total_bytes, time.perf_counter() - started_s)
            return GrantReply(grant.total_bytes, checksum)
        except BaseException:
            totals.failures += 1
            self.unlink(link.link_id)
            raise
        finally:
            link.sending -= 1
            link.used_s = time.monotonic()

    async def rendezvous_set(self, link_id: str, key: str, value: bytes) -> None:
        """Raises TransferError."""
        self._board(link_id).post(key, value)

    async def rendezvous_get(self, link_id: str, key: str, timeout_s: float) -> bytes:
        """Raises TransferError or DeadlineError."""
        return await self._board(link_id).read_async(key, timeout_s)

    def links(self) -> tuple[LinkStats, ...]:
        """Totals of every peer known since the last `drop`. Over shared memory decode counts the bytes."""
        return tuple(totals.stats() for totals in self._totals.values())

    def drop(self, peer_id: str) -> None:
        """That instance is gone: end its link."""
        for link in [link for link in self._links.values() if link.peer_id == peer_id]:
            self.unlink(link.link_id)

    async def close(self) -> None:
        """End all links and wait for their threads, at most as long as an operation may take."""
        for link_id in list(self._links):
            self.unlink(link_id)
        timeout_s = self._config.operation_timeout_s(MAX_WINDOW_BYTES)
        for group in self._killed:
            if not await asyncio.to_thread(group.join, timeout_s):
                _log.warning("a KV link's thread still hangs")
        self._killed.clear()
        self._pairs.close()
        if self._descriptors is not None:
            self._descriptors.close()
            self._descriptors = None

    def _transports(self, offer: LinkOffer) -> set[Transport]:
        transports = {self._pairs.transport}
        if self._pool.fd is not None and offer.host == host_identity():
            transports.add(Transport.SHARED_MEMORY)
        return transports

    def _make_room(self) -> None:
        if len(self._links) < self._config.max_links:
            return
        idle = [link for link in self._links.values() if not link.sending]
        if not idle:
            raise OverloadedError("too many KV links are busy")
        self.unlink(min(idle, key=lambda link: link.used_s).link_id)

    def _board(self, link_id: str) -> LocalBoard:
        if link := self._links.get(link_id):
            return link.board
        raise TransferError("the KV link has ended")

    def _plan(self, link: _Link, grant: Grant, manifest: Manifest) -> tuple[list[Window], PoolView]:
        """What to send for a grant, after checking that decode has computed the same."""
        if (manifest.request_id, manifest.epoch) != (grant.request_id, grant.epoch):
            raise StaleEpochError("the grant belongs to another attempt")
        layout, portion = self._layout, grant.portion
        if (
            grant.sequence != link.next_sequence
            or not 0 <= portion.layer_begin < portion.layer_end <= layout.num_layers
            or not 0 <= portion.head_begin < portion.head_end <= layout.num_kv_heads
            or not 0 < grant.window_bytes <= MAX_WINDOW_BYTES
        ):
            raise TransferError("the grant does not fit the link")
        view = PoolView.over(self._pool.tensor, layout, portion)
        if grant.total_bytes != len(manifest.block_ids) * view.block_bytes:
            raise TransferError("the grant is not for exactly the shipment's bytes")
        plan = windows(portion.num_layers, len(manifest.block_ids), view.layer_block_bytes, grant.window_bytes)
        return plan, view

"""Decode's ends of its links: made when first needed, one per prefill instance, ended with either side."""

import asyncio
import logging
import math
import time
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import WeakValueDictionary

from tandem.core.errors import (
    ConfigError,
    DeadlineError,
    IncompatiblePeerError,
    OverloadedError,
    TransferError,
)
from tandem.core.kv_codec import KvCodec
from tandem.core.kv_layout import KvLayout
from tandem.core.transfer import (
    LinkOffer,
    LinkReply,
    NoLinkError,
    PeerControl,
    PeerGoneError,
    Transport,
    unknown_format,
)
from tandem.kv_transfer.arrival import OwnPools, PairPlan
from tandem.kv_transfer.block_coder import KvCodes
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.descriptors import host_identity
from tandem.kv_transfer.link_totals import LinkTotals
from tandem.kv_transfer.process_group_link import ProcessGroupFactory, ProcessGroupLink
from tandem.kv_transfer.process_groups import DECODE_RANK
from tandem.kv_transfer.rendezvous import RemoteRendezvousStore
from tandem.kv_transfer.shared_memory_link import SharedMemoryLink, UnreachableMemoryError

_log = logging.getLogger(__name__)

_NOT_MADE = "the KV link could not be made in time"
MAX_RANKS = 1024  # of an instance
MAX_BLOCK_SIZE = 1 << 16


@dataclass(slots=True, eq=False)
class ReceiveLink:
    """A link to one prefill instance. Transfers over it take turns: a transfer holds `turn` while its bytes move."""

    peer: PeerControl
    reply: LinkReply
    plan: PairPlan
    end: SharedMemoryLink | ProcessGroupLink
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    next_sequence: int = 0
    users: int = 0
    used_s: float = field(default_factory=time.monotonic)

    @property
    def alive(self) -> bool:
        return not self.end.closed and self.peer.is_linked(self.reply.link_id)


class ReceiveLinks:
    """All links of one instance, by peer. Lives on the event loop."""

    def __init__(
        self,
        pools: OwnPools,
        instance_id: str,
        transport: Transport | None,
        config: LinkConfig,
        totals: LinkTotals,
        codec: KvCodec = KvCodec.NONE,
        codes: KvCodes | None = None,
    ) -> None:
        """`transport` None takes the fastest possible one; a named one is taken or is an error. `codec` is for links on
        which bytes are sent. `codes`: see `BlockCoder`."""
        self._codec = codec
        self._codes = codes
        self._pools = pools
        self._instance_id = instance_id
        self._transport = transport
        self._config = config
        self._totals = totals
        self._groups = ProcessGroupFactory(pools.device, config)
        self.by_peer: dict[str, ReceiveLink] = {}
        self.making: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # held while a link is made
        self._not_made_s: dict[str, float] = {}  # when a link could not be made, by peer
        self._closing: list[SharedMemoryLink | ProcessGroupLink] = []  # closed ones whose threads may still run

    async def get(self, peer: PeerControl) -> ReceiveLink:
        """The live link to that peer, made now if there is none. Raises NoLinkError when that takes too long, and
        PeerGoneError for a peer that is gone: transfers that waited for a link need not find out by themselves."""
        making = self.making.setdefault(peer.instance_id, asyncio.Lock())
        asked_s = time.monotonic()
        async with making:
            link = self.by_peer.get(peer.instance_id)
            if link is not None and link.alive and not link.peer.is_gone:
                return link
            if peer.is_gone:
                raise PeerGoneError("the prefill worker cannot be reached")
            if self._not_made_s.get(peer.instance_id, -math.inf) >= asked_s:
                raise NoLinkError(_NOT_MADE)
            self.unlink(peer.instance_id)
            self._evict_idle_link()
            try:
                async with asyncio.timeout(self._config.link_timeout_s):
                    link = await self._make_link(peer)
            except (TimeoutError, DeadlineError, NoLinkError) as error:
                self._not_made_s[peer.instance_id] = time.monotonic()
                raise NoLinkError(_NOT_MADE) from error
            self._not_made_s.pop(peer.instance_id, None)
            if not link.alive:
                self._close_end(link.end)
                raise TransferError("the KV link ended as soon as it was made")
            self.by_peer[peer.instance_id] = link
            transport, source = link.reply.transport, link.plan.source
            codec = KvCodec.NONE if transport is Transport.SHARED_MEMORY else self._codec
            self._totals.linked(peer.instance_id, transport, codec)
            peer.when_unlinked(link.reply.link_id, partial(self._link_ended, link))
            speed = f"{link.end.bytes_per_s / 1e9:.2f} GB/s, codec {codec.value}"
            shape = f"{source.num_ranks} ranks, blocks of {source.block_size} tokens"
            _log.info("linked to %s (%s): transport %s, measured %s", peer.instance_id, shape, transport.value, speed)
            return link

    def unlink(self, peer_id: str) -> None:
        """End the link to that peer, if there is one. Does not wait."""
        if link := self.by_peer.pop(peer_id, None):
            link.peer.unlink(link.reply.link_id)
            self._close_end(link.end)

    def drop(self, peer_id: str) -> None:
        """That instance is gone: end its link and forget the instance."""
        self.unlink(peer_id)
        self._not_made_s.pop(peer_id, None)
        self._totals.forget(peer_id)

    async def close(self, timeout_s: float) -> None:
        """End all links and wait for their threads, at most so long for each."""
        for peer_id in list(self.by_peer):
            self.unlink(peer_id)
        for end in self._closing:
            if not await asyncio.to_thread(end.join, timeout_s):
                _log.warning("a KV link's thread still hangs")
        self._closing.clear()
        self._groups.close()

    async def _make_link(self, peer: PeerControl) -> ReceiveLink:
        try:
            return await self._try_transports(peer, self._transports())
        except UnreachableMemoryError as error:
            if self._transport is not None:
                raise
            _log.warning("no shared memory with %s: %s", peer.instance_id, error.message)
            return await self._try_transports(peer, (self._groups.transport,))

    async def _try_transports(self, peer: PeerControl, transports: tuple[Transport, ...]) -> ReceiveLink:
        own = self._pools.layout
        offer = LinkOffer(self._instance_id, own.fingerprint, host_identity(), transports, self._codec.format_name)
        reply = await peer.link(offer, self._config.link_timeout_s)
        try:
            if reply.instance_id != peer.instance_id:
                raise TransferError("the prefill worker was restarted")
            if reply.fingerprint != own.fingerprint or reply.transport not in transports:
                raise IncompatiblePeerError("the prefill worker's answer does not fit the offer")
            codec = KvCodec.NONE if reply.transport is Transport.SHARED_MEMORY else self._codec
            if reply.kv_format != codec.format_name:
                raise unknown_format(codec.format_name)
            plan = PairPlan.make(_source_layout(own, reply), self._pools, codec, self._codes)
            return ReceiveLink(peer, reply, plan, await self._open_end(peer, reply, plan))
        except BaseException:
            peer.unlink(reply.link_id)
            raise

    async def _open_end(
        self, peer: PeerControl, reply: LinkReply, plan: PairPlan
    ) -> SharedMemoryLink | ProcessGroupLink:
        name = f"kv-from-{peer.instance_id}"
        if reply.transport is Transport.SHARED_MEMORY:
            return await SharedMemoryLink.open(reply, plan, name)
        loop, timeout_s = asyncio.get_running_loop(), self._config.link_timeout_s
        store = RemoteRendezvousStore(peer, reply.link_id, loop, timeout_s)
        group = ProcessGroupLink.start(self._groups, self._config, DECODE_RANK, store, name)
        try:
            await group.ready()
        except BaseException as error:
            self._close_end(group)
            if isinstance(error, TransferError) and not peer.is_gone:
                raise NoLinkError(_NOT_MADE) from error
            raise
        return group

    def _transports(self) -> tuple[Transport, ...]:
        if self._transport is not None:
            return (self._transport,)
        by_group = self._groups.transport
        can_map = by_group is Transport.GLOO and self._pools.are_here
        return (Transport.SHARED_MEMORY, by_group) if can_map else (by_group,)

    def _link_ended(self, link: ReceiveLink) -> None:
        """The link's control stream has ended. The other side's memory must not stay mapped until the next fetch."""
        peer_id = link.peer.instance_id
        if self.by_peer.get(peer_id) is link:
            (self.drop if link.peer.is_gone else self.unlink)(peer_id)

    def _close_end(self, end: SharedMemoryLink | ProcessGroupLink) -> None:
        end.close()
        self._closing = [other for other in self._closing if not other.join(0.0)] + [end]

    def _evict_idle_link(self) -> None:
        if len(self.by_peer) < self._config.max_links:
            return
        idle = [link for link in self.by_peer.values() if not link.users]
        if not idle:
            raise OverloadedError("too many KV links are busy")
        self.unlink(min(idle, key=lambda link: link.used_s).peer.instance_id)


def parse_transport(transport: Transport | str) -> Transport | None:
    """None for "auto". Raises ConfigError."""
    try:
        return None if transport == "auto" else Transport(transport)
    except ValueError as error:
        raise ConfigError(f"'{transport}' is no transport for KV") from error


def _source_layout(own: KvLayout, reply: LinkReply) -> KvLayout:
    """The layout of a source with the same format. Raises IncompatiblePeerError for one that cannot be."""
    layout = replace(
        own,
        num_blocks=reply.num_blocks,
        block_size=reply.block_size,
        tp=reply.tp,
        layers_per_stage=reply.layers_per_stage,
    )
    stages = layout.layers_per_stage
    if (
        min(layout.num_blocks, layout.block_size, layout.tp, *stages) < 1
        or layout.block_size > MAX_BLOCK_SIZE
        or layout.num_ranks > MAX_RANKS
        or (stages and sum(stages) != layout.num_layers)
    ):
        raise IncompatiblePeerError(
            f"the prefill worker's KV is divided in a way that does not fit the model: tp {layout.tp}, "
            f"{list(stages) or 'one stage'} of {layout.num_layers} layers, {layout.num_blocks} blocks of "
            f"{layout.block_size} tokens"
        )
    if reply.transport is Transport.SHARED_MEMORY and len(reply.nonces) != layout.num_ranks:
        raise IncompatiblePeerError("the prefill worker's answer does not name the memory of all its ranks")
    return layout

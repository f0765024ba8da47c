"""Decode's side of the hand-over: pulls a finished prefill's KV into blocks of its own pool, whole or not at all."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tandem.core.errors import (
    ConfigError,
    DeadlineError,
    IncompatiblePeerError,
    OverloadedError,
    StaleEpochError,
    TandemError,
    TransferError,
)
from tandem.core.kv_layout import KvLayout
from tandem.core.request import SampledToken
from tandem.core.session import LinkStats
from tandem.core.shipment import Manifest
from tandem.core.transfer import Grant, LinkOffer, LinkReply, PeerControl, Transport
from tandem.kv_transfer.blocks import Gate, Pieces, PoolView, Window, windows
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.descriptors import host_identity
from tandem.kv_transfer.group_links import GroupLink, PairMaker
from tandem.kv_transfer.pair import DECODE_RANK
from tandem.kv_transfer.rendezvous import RemoteBoard
from tandem.kv_transfer.reshard import RankGrid, plan_copies
from tandem.kv_transfer.shared_link import SharedLink, UnreachableMemoryError
from tandem.kv_transfer.totals import LinkTotals

_log = logging.getLogger(__name__)

WINDOW_BYTES = (
    2 << 20
)  # of one message between two processes: small enough that gathering, sending and scattering overlap
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Fetched:
    """KV that has arrived whole and belongs to decode. `seconds` ran from the manifest to the acknowledgement."""

    manifest: Manifest
    bytes: int
    seconds: float
    transport: Transport

    @property
    def first_token(self) -> SampledToken:
        return self.manifest.first_token


class _Link:
    """A live link to one peer. `turn` is held while a pair is in use: its operations have an order."""

    def __init__(self, peer: PeerControl, reply: LinkReply, end: SharedLink | GroupLink) -> None:
        self.peer = peer
        self.reply = reply
        self.end = end
        self.turn = asyncio.Lock()
        self.next_sequence = 0
        self.users = 0
        self.used_s = time.monotonic()

    @property
    def alive(self) -> bool:
        return not self.end.dead and self.peer.is_linked(self.reply.link_id)


class KvReceiver:
    """The decode end of all links of one rank. Lives on the event loop; bytes move in the links' threads.

    `pool` (contiguous, any dtype, at least `layout.pool_bytes`) stays the caller's.
    """

    def __init__(
        self,
        layout: KvLayout,
        pool: torch.Tensor,
        instance_id: str,
        *,
        transport: Transport | str = "auto",
        checksum: bool | None = None,
        timeout_s: float = 10.0,
        link_config: LinkConfig | None = None,
    ) -> None:
        """`transport` "auto" takes the fastest that can be had, a named one is taken or it is an error. `checksum` None
        checks what came over sockets. `timeout_s` bounds a hand-over from manifest to acknowledgement.

        Raises ConfigError for an unknown transport.
        """
        self._layout = layout
        one_rank = RankGrid(layout.num_layers, layout.num_kv_heads)
        (copy,) = plan_copies(one_rank, one_rank, destination_rank=0)
        self._portion = copy.source
        self._view = PoolView.over(pool, layout, self._portion)
        self._pieces: Pieces | None = None
        self._instance_id = instance_id
        self._transport = _parse_transport(transport)
        self._checksum = checksum
        self._timeout_s = timeout_s
        self._link_config = link_config or LinkConfig()
        self._pairs = PairMaker(pool.device, self._link_config)
        self._links: dict[str, _Link] = {}
        self._linking: dict[str, asyncio.Lock] = {}
        self._totals: dict[str, LinkTotals] = {}
        self._killed: list[SharedLink | GroupLink] = []

    async def fetch(
        self,
        peer: PeerControl,
        request_id: str,
        epoch: int,
        token_ids: Sequence[int],
        block_ids: Sequence[int],
        deadline_s: float,
    ) -> Fetched:
        """Wait for the attempt's prefill, copy its KV into `block_ids` of our pool, and take it over.

        `token_ids` are those whose KV is expected; `block_ids` are distinct and at least as many as they need, in
        order. `deadline_s` is on `time.monotonic()`, and may be infinite. Fetches over one pair take turns.

        When this returns, the blocks hold exactly that KV and the prefill worker has given it up. When it raises,
        cancellation included, the blocks hold anything, but nothing writes to them any more: they may be reused at
        once. Raises TransferError (StaleEpochError: the lease ended), IncompatiblePeerError, PeerGoneError,
        DeadlineError, or the error with which the prefill ended.
        """
        needed = self._layout.blocks_for(len(token_ids))
        assert len(set(block_ids)) == len(block_ids) >= needed
        assert all(0 <= block < self._layout.num_blocks for block in block_ids)
        block_ids = block_ids[:needed]
        link = await self._link(peer, deadline_s)  # before the wait: it costs time, and tells whether we fit at all
        manifest = await peer.pull(request_id, epoch, _remaining_s(deadline_s))
        manifest.check(request_id=request_id, epoch=epoch, token_ids=token_ids, fingerprint=self._layout.fingerprint)
        self._check_blocks(manifest, link.reply, needed)
        started_s = time.monotonic()
        timeout_s = min(self._timeout_s, _remaining_s(deadline_s))
        gate = Gate()
        try:
            async with asyncio.timeout(timeout_s):
                link = await self._move(peer, manifest, block_ids, gate, started_s + timeout_s)
                if not await peer.acknowledge(request_id, epoch, timeout_s):
                    raise StaleEpochError("the KV's lease ended before it had arrived")
        except (TimeoutError, DeadlineError) as error:
            self._fail(peer)
            _remaining_s(deadline_s)
            raise TransferError("the KV did not arrive in time") from error
        except TandemError:
            self._fail(peer)
            raise
        finally:
            gate.close()
        seconds = time.monotonic() - started_s
        num_bytes = needed * self._layout.block_bytes
        if totals := self._totals.get(peer.instance_id):  # unless it was dropped meanwhile
            totals.count(num_bytes, seconds)
        return Fetched(manifest, num_bytes, seconds, link.reply.transport)

    def links(self) -> tuple[LinkStats, ...]:
        """Totals of every peer since it was first linked or last dropped."""
        return tuple(totals.stats() for totals in self._totals.values())

    def drop(self, peer_id: str) -> None:
        """That instance is gone: end its link and forget it. Fetches from it fail."""
        self._unlink(peer_id)
        self._totals.pop(peer_id, None)
        self._linking.pop(peer_id, None)

    async def close(self) -> None:
        """End all links and wait for their threads, at most as long as an operation may take."""
        for peer_id in list(self._links):
            self._unlink(peer_id)
        timeout_s = self._link_config.operation_timeout_s(WINDOW_BYTES)
        for end in self._killed:
            if not await asyncio.to_thread(end.join, timeout_s):
                _log.warning("a KV link's thread still hangs")
        self._killed.clear()
        self._pairs.close()

    def _fail(self, peer: PeerControl) -> None:
        if totals := self._totals.get(peer.instance_id):
            totals.failures += 1

    # --- links ---

    async def _link(self, peer: PeerControl, deadline_s: float) -> _Link:
        """The live link to that peer, made now if there is none."""
        async with self._linking.setdefault(peer.instance_id, asyncio.Lock()):
            link = self._links.get(peer.instance_id)
            if link is not None and link.alive:
                return link
            self._unlink(peer.instance_id)
            self._make_room()
            timeout_s = min(self._link_config.link_timeout_s, _remaining_s(deadline_s))
            link = await self._make_link(peer, timeout_s)
            self._unlink(peer.instance_id)  # one made meanwhile, after a drop
            self._links[peer.instance_id] = link
            transport = link.reply.transport
            self._totals.setdefault(peer.instance_id, LinkTotals(peer.instance_id, transport)).transport = transport
            speed = f"{link.end.bytes_per_s / 1e9:.2f} GB/s"
            _log.info("linked to %s: transport %s, measured %s", peer.instance_id, transport.value, speed)
            return link

    async def _make_link(self, peer: PeerControl, timeout_s: float) -> _Link:
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    return await self._try_transports(peer, self._transports(), timeout_s)
                except UnreachableMemoryError as error:
                    if self._transport is not None:
                        raise
                    _log.warning("no shared memory with %s: %s", peer.instance_id, error.message)
                    return await self._try_transports(peer, (self._pairs.transport,), timeout_s)
        except TimeoutError as error:
            raise TransferError("the KV link could not be made in time") from error

    async def _try_transports(self, peer: PeerControl, transports: tuple[Transport, ...], timeout_s: float) -> _Link:
        offer = LinkOffer(self._instance_id, self._layout.fingerprint, host_identity(), transports)
        reply = await peer.link(offer, timeout_s)
        try:
            if reply.instance_id != peer.instance_id:
                raise TransferError("the prefill worker was restarted")
            if (
                reply.fingerprint != self._layout.fingerprint
                or reply.transport not in transports
                or reply.num_blocks < 1
            ):
                raise IncompatiblePeerError("the prefill worker's answer does not fit the offer")
            return _Link(peer, reply, await self._open_end(peer, reply, timeout_s))
        except BaseException:
            peer.unlink(reply.link_id)
            raise

    async def _open_end(self, peer: PeerControl, reply: LinkReply, timeout_s: float) -> SharedLink | GroupLink:
        name = f"kv-from-{peer.instance_id}"
        if reply.transport is Transport.SHARED_MEMORY:
            source_layout = replace(self._layout, num_blocks=reply.num_blocks)
            return await SharedLink.open(reply, source_layout, self._portion, name)
        board = RemoteBoard(peer, reply.link_id, asyncio.get_running_loop(), timeout_s)
        group = GroupLink.start(self._pairs, self._link_config, DECODE_RANK, board, name)
        try:
            await group.ready()
        except BaseException:
            self._bury(group)
            raise
        return group

    def _transports(self) -> tuple[Transport, ...]:
        if self._transport is not None:
            return (self._transport,)
        by_group = self._pairs.transport
        return (Transport.SHARED_MEMORY, by_group) if by_group is Transport.GLOO else (by_group,)

    def _unlink(self, peer_id: str) -> None:
        if link := self._links.pop(peer_id, None):
            link.peer.unlink(link.reply.link_id)
            self._bury(link.end)

    def _bury(self, end: SharedLink | GroupLink) -> None:
        end.kill()
        self._killed = [other for other in self._killed if not other.join(0.0)] + [end]

    def _make_room(self) -> None:
        if len(self._links) < self._link_config.max_links:
            return
        idle = [link for link in self._links.values() if not link.users]
        if not idle:
            raise OverloadedError("too many KV links are busy")
        self._unlink(min(idle, key=lambda link: link.used_s).peer.instance_id)

    # --- moving the bytes ---

    async def _move(
        self, peer: PeerControl, manifest: Manifest, block_ids: Sequence[int], gate: Gate, deadline_s: float
    ) -> _Link:
        while True:
            link = await self._link(peer, deadline_s)
            link.users += 1
            try:
                if isinstance(link.end, SharedLink):
                    await self._copy(link, link.end, manifest, block_ids, gate, deadline_s)
                    return link
                async with link.turn:
                    if not link.alive:  # it broke under the fetch before ours: not our failure
                        continue
                    await self._receive(link, link.end, manifest, block_ids, gate, deadline_s)
                    return link
            finally:
                link.users -= 1
                link.used_s = time.monotonic()

    async def _copy(
        self,
        link: _Link,
        end: SharedLink,
        manifest: Manifest,
        block_ids: Sequence[int],
        gate: Gate,
        deadline_s: float,
    ) -> None:
        if self._pieces is None:
            self._pieces = self._view.pieces()
        await end.copy(manifest.block_ids, self._pieces, block_ids, gate)
        if self._checksum:
            plan = self._plan(len(block_ids))
            async with link.turn:
                reply = await link.peer.grant(self._grant(link, manifest, True), _remaining_s(deadline_s))
            if reply.checksum != await end.checksum(self._view, block_ids, plan):
                raise TransferError("the KV's checksum does not match")

    async def _receive(
        self,
        link: _Link,
        end: GroupLink,
        manifest: Manifest,
        block_ids: Sequence[int],
        gate: Gate,
        deadline_s: float,
    ) -> None:
        checksum = self._checksum if self._checksum is not None else link.reply.transport is Transport.GLOO
        grant = self._grant(link, manifest, checksum)
        plan = self._plan(len(block_ids))
        try:
            async with asyncio.TaskGroup() as group:
                # The call is open while bytes move: when the peer dies it fails within milliseconds, while gloo
                # itself would hang until its timeout.
                granting = group.create_task(link.peer.grant(grant, _remaining_s(deadline_s)))
                receiving = group.create_task(end.receive(self._view, block_ids, plan, gate, checksum))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        reply = granting.result()
        if (reply.sent_bytes, reply.checksum) != (grant.total_bytes, receiving.result()):
            raise TransferError("the KV that arrived is not what was sent")

    def _grant(self, link: _Link, manifest: Manifest, checksum: bool) -> Grant:
        sequence = link.next_sequence
        link.next_sequence += 1
        return Grant(
            link_id=link.reply.link_id,
            request_id=manifest.request_id,
            epoch=manifest.epoch,
            sequence=sequence,
            portion=self._portion,
            total_bytes=len(manifest.block_ids) * self._view.block_bytes,
            window_bytes=WINDOW_BYTES,
            checksum=checksum,
        )

    def _plan(self, num_blocks: int) -> list[Window]:
        return windows(self._portion.num_layers, num_blocks, self._view.layer_block_bytes, WINDOW_BYTES)

    def _check_blocks(self, manifest: Manifest, reply: LinkReply, num_blocks: int) -> None:
        blocks = manifest.block_ids
        if len(blocks) != num_blocks or len(set(blocks)) != num_blocks:
            raise TransferError("the shipment has the wrong number of blocks")
        if not all(0 <= block < reply.num_blocks for block in blocks):
            raise TransferError("the shipment names blocks that are not in the prefill worker's pool")
        if manifest.bytes_per_layer != num_blocks * 2 * self._layout.segment_bytes:
            raise TransferError("the shipment has the wrong number of bytes")


def _remaining_s(deadline_s: float) -> float:
    """Seconds until then, at most a day: gRPC knows no infinite deadline. Raises DeadlineError."""
    remaining_s = deadline_s - time.monotonic()
    if remaining_s <= 0.0:
        raise DeadlineError("the deadline passed before the KV had arrived")
    return min(remaining_s, _DAY_S)


def _parse_transport(transport: Transport | str) -> Transport | None:
    try:
        return None if transport == "auto" else Transport(transport)
    except ValueError as error:
        raise ConfigError(f"'{transport}' is no transport for KV") from error

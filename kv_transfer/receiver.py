"""Decode's side of KV transfers: fetches a finished prefill's KV into blocks of its own pool, all of it or none."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import WeakValueDictionary

import torch

from tandem.core.errors import (
    ConfigError,
    DeadlineError,
    IncompatiblePeerError,
    InternalError,
    OverloadedError,
    StaleEpochError,
    TandemError,
    TransferError,
)
from tandem.core.kv_layout import KvLayout
from tandem.core.request import SampledToken
from tandem.core.session import LinkStats
from tandem.core.transfer import Grant, LinkOffer, LinkReply, Manifest, PeerControl, Transport
from tandem.kv_transfer.blocks import BlockTransfer, BlockViews, PoolView, WriteFence
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.descriptors import host_identity
from tandem.kv_transfer.link_totals import LinkTotals
from tandem.kv_transfer.process_group_link import ProcessGroupFactory, ProcessGroupLink
from tandem.kv_transfer.process_groups import DECODE_RANK
from tandem.kv_transfer.rendezvous import RemoteRendezvousStore
from tandem.kv_transfer.reshard import KvSharding, plan_copies
from tandem.kv_transfer.shared_memory_link import SharedMemoryLink, UnreachableMemoryError

_log = logging.getLogger(__name__)

CHUNK_BYTES = 2 << 20  # small enough that gathering, sending and scattering overlap
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class FetchResult:
    """KV that has arrived completely and belongs to decode. `seconds` ran from the manifest to the acknowledgement."""

    manifest: Manifest
    bytes: int
    seconds: float
    transport: Transport

    @property
    def first_token(self) -> SampledToken:
        return self.manifest.first_token


@dataclass(slots=True, eq=False)
class _ReceiveLink:
    """A link to one prefill instance. Transfers over it take turns: a transfer holds `turn` while its bytes move."""

    peer: PeerControl
    reply: LinkReply
    end: SharedMemoryLink | ProcessGroupLink
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    next_sequence: int = 0
    users: int = 0
    used_s: float = field(default_factory=time.monotonic)

    @property
    def alive(self) -> bool:
        return not self.end.closed and self.peer.is_linked(self.reply.link_id)


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
        """`transport` "auto" takes the fastest possible transport; a named one is taken or is an error. `checksum`
        None checks bytes that came over gloo. `timeout_s` bounds a transfer from its turn on the link to its
        acknowledgement.

        Raises ConfigError for an unknown transport.
        """
        self._layout = layout
        one_rank = KvSharding(layout.num_layers, layout.num_kv_heads)
        (copy,) = plan_copies(one_rank, one_rank, destination_rank=0)
        self._kv_slice = copy.source
        self._view = PoolView.over(pool, layout, self._kv_slice)
        self._block_views: BlockViews | None = None
        self._instance_id = instance_id
        self._transport = _parse_transport(transport)
        self._checksum = checksum
        self._timeout_s = timeout_s
        self._link_config = link_config or LinkConfig()
        self._groups = ProcessGroupFactory(pool.device, self._link_config)
        self._links: dict[str, _ReceiveLink] = {}
        self._linking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # held while a link is made
        self._totals = LinkTotals(self._link_config.max_links)
        self._closing: list[SharedMemoryLink | ProcessGroupLink] = []  # closed ones whose threads may still run

    async def fetch(
        self,
        peer: PeerControl,
        request_id: str,
        epoch: int,
        token_ids: Sequence[int],
        block_ids: Sequence[int],
        deadline_s: float,
    ) -> FetchResult:
        """Wait for the attempt's prefill, copy its KV into `block_ids` of our pool, and take it over.

        `token_ids` are those whose KV is expected; `block_ids` are distinct and at least as many as they need, in
        order. `deadline_s` is on `time.monotonic()`, and may be infinite; it bounds every wait.

        When this returns, the blocks hold exactly that KV and the prefill worker has given it up. When it raises,
        cancellation included, the blocks hold anything, but nothing writes to them any more: they may be reused at
        once. Raises `asyncio.CancelledError` only if the task was cancelled, else TransferError (StaleEpochError: the
        lease ended), IncompatiblePeerError, OverloadedError, PeerGoneError, DeadlineError (`deadline_s` has passed),
        or the error with which the prefill ended. InternalError for block ids that do not fit; nothing is written then.
        """
        needed = self._layout.blocks_for(len(token_ids))
        if not len(set(block_ids)) == len(block_ids) >= needed or not all(
            0 <= block < self._layout.num_blocks for block in block_ids
        ):
            raise InternalError(
                f"A fetch of {needed} blocks got blocks that are too few, not distinct or not in the pool"
            )
        block_ids = block_ids[:needed]
        fence = WriteFence()
        try:
            async with asyncio.timeout(_remaining_s(deadline_s)):
                link = await self._link(peer)  # before the wait: it takes time, and tells whether the formats agree
                manifest = await peer.pull(request_id, epoch, _remaining_s(deadline_s))
                manifest.check(
                    request_id=request_id, epoch=epoch, token_ids=token_ids, fingerprint=self._layout.fingerprint
                )
                self._check_blocks(manifest, link.reply, needed)
                return await self._transfer(peer, manifest, block_ids, fence)
        except TimeoutError as error:
            raise DeadlineError("the deadline passed before the KV had arrived") from error
        except (RuntimeError, OSError, MemoryError) as error:  # torch's and the system's; another pair may manage
            _log.exception("the KV transfer of %s failed", request_id)
            raise TransferError("the KV transfer failed; the decode worker's log says why") from error
        finally:
            await fence.close()

    def links(self) -> tuple[LinkStats, ...]:
        """Totals per peer (see `LinkTotals`)."""
        return self._totals.stats()

    def drop(self, peer_id: str) -> None:
        """That instance is gone: end its link and forget the instance. Fetches from it fail."""
        self._unlink(peer_id)
        self._totals.forget(peer_id)

    async def close(self) -> None:
        """End all links and wait for their threads, at most as long as an operation may take."""
        for peer_id in list(self._links):
            self._unlink(peer_id)
        timeout_s = self._link_config.operation_timeout_s(CHUNK_BYTES)
        for end in self._closing:
            if not await asyncio.to_thread(end.join, timeout_s):
                _log.warning("a KV link's thread still hangs")
        self._closing.clear()
        self._groups.close()

    # --- links ---

    async def _link(self, peer: PeerControl) -> _ReceiveLink:
        """The live link to that peer, made now if there is none. Raises TransferError when that takes too long."""
        making = self._linking.setdefault(peer.instance_id, asyncio.Lock())
        async with making:
            link = self._links.get(peer.instance_id)
            if link is not None and link.alive:
                return link
            self._unlink(peer.instance_id)
            self._evict_idle_link()
            try:
                async with asyncio.timeout(self._link_config.link_timeout_s):
                    link = await self._make_link(peer)
            except (TimeoutError, DeadlineError) as error:
                raise TransferError("the KV link could not be made in time") from error
            if not link.alive:
                self._close_end(link.end)
                raise TransferError("the KV link ended as soon as it was made")
            self._links[peer.instance_id] = link
            transport = link.reply.transport
            self._totals.linked(peer.instance_id, transport)
            peer.when_unlinked(link.reply.link_id, partial(self._link_ended, link))
            speed = f"{link.end.bytes_per_s / 1e9:.2f} GB/s"
            _log.info("linked to %s: transport %s, measured %s", peer.instance_id, transport.value, speed)
            return link

    async def _make_link(self, peer: PeerControl) -> _ReceiveLink:
        try:
            return await self._try_transports(peer, self._transports())
        except UnreachableMemoryError as error:
            if self._transport is not None:
                raise
            _log.warning("no shared memory with %s: %s", peer.instance_id, error.message)
            return await self._try_transports(peer, (self._groups.transport,))

    async def _try_transports(self, peer: PeerControl, transports: tuple[Transport, ...]) -> _ReceiveLink:
        offer = LinkOffer(self._instance_id, self._layout.fingerprint, host_identity(), transports)
        reply = await peer.link(offer, self._link_config.link_timeout_s)
        try:
            if reply.instance_id != peer.instance_id:
                raise TransferError("the prefill worker was restarted")
            same_format = reply.fingerprint == self._layout.fingerprint
            if not same_format or reply.transport not in transports or reply.num_blocks < 1:
                raise IncompatiblePeerError("the prefill worker's answer does not fit the offer")
            return _ReceiveLink(peer, reply, await self._open_end(peer, reply))
        except BaseException:
            peer.unlink(reply.link_id)
            raise

    async def _open_end(self, peer: PeerControl, reply: LinkReply) -> SharedMemoryLink | ProcessGroupLink:
        name = f"kv-from-{peer.instance_id}"
        if reply.transport is Transport.SHARED_MEMORY:
            source_layout = replace(self._layout, num_blocks=reply.num_blocks)
            return await SharedMemoryLink.open(reply, source_layout, self._kv_slice, name)
        loop, timeout_s = asyncio.get_running_loop(), self._link_config.link_timeout_s
        store = RemoteRendezvousStore(peer, reply.link_id, loop, timeout_s)
        group = ProcessGroupLink.start(self._groups, self._link_config, DECODE_RANK, store, name)
        try:
            await group.ready()
        except BaseException:
            self._close_end(group)
            raise
        return group

    def _transports(self) -> tuple[Transport, ...]:
        if self._transport is not None:
            return (self._transport,)
        by_group = self._groups.transport
        return (Transport.SHARED_MEMORY, by_group) if by_group is Transport.GLOO else (by_group,)

    def _link_ended(self, link: _ReceiveLink) -> None:
        """The link's control stream has ended. The other side's memory must not stay mapped until the next fetch."""
        peer_id = link.peer.instance_id
        if self._links.get(peer_id) is link:
            (self.drop if link.peer.is_gone else self._unlink)(peer_id)

    def _unlink(self, peer_id: str) -> None:
        if link := self._links.pop(peer_id, None):
            link.peer.unlink(link.reply.link_id)
            self._close_end(link.end)

    def _close_end(self, end: SharedMemoryLink | ProcessGroupLink) -> None:
        end.close()
        self._closing = [other for other in self._closing if not other.join(0.0)] + [end]

    def _evict_idle_link(self) -> None:
        if len(self._links) < self._link_config.max_links:
            return
        idle = [link for link in self._links.values() if not link.users]
        if not idle:
            raise OverloadedError("too many KV links are busy")
        self._unlink(min(idle, key=lambda link: link.used_s).peer.instance_id)

    # --- one transfer ---

    async def _transfer(
        self, peer: PeerControl, manifest: Manifest, block_ids: Sequence[int], fence: WriteFence
    ) -> FetchResult:
        manifest_s = time.monotonic()
        try:
            transport, turn_s = await self._move(peer, manifest, block_ids, fence)
            timeout_s = turn_s + self._timeout_s - time.monotonic()
            if not await peer.acknowledge(manifest.request_id, manifest.epoch, timeout_s):
                raise StaleEpochError("the KV's lease ended before it had arrived")
        except (TimeoutError, DeadlineError) as error:
            self._totals.add(peer.instance_id, failures=1)
            raise TransferError("the KV did not arrive in time") from error
        except TandemError:
            self._totals.add(peer.instance_id, failures=1)
            raise
        end_s = time.monotonic()
        num_bytes = len(block_ids) * self._layout.block_bytes
        self._totals.add(peer.instance_id, transfers=1, nbytes=num_bytes, seconds=end_s - turn_s)
        return FetchResult(manifest, num_bytes, end_s - manifest_s, transport)

    async def _move(
        self, peer: PeerControl, manifest: Manifest, block_ids: Sequence[int], fence: WriteFence
    ) -> tuple[Transport, float]:
        """Bring the bytes into the blocks. Returns the transport and when the transfer's turn came (monotonic)."""
        transfer = BlockTransfer(self._view, block_ids, CHUNK_BYTES)
        while True:
            link = await self._link(peer)
            link.users += 1
            try:
                async with link.turn:
                    if not link.alive:  # the link broke during an earlier turn: not a failure of this transfer
                        continue
                    turn_s = time.monotonic()  # the time-out begins now: earlier transfers do not use it up
                    async with asyncio.timeout(self._timeout_s):
                        if isinstance(link.end, SharedMemoryLink):
                            await self._copy(link, link.end, manifest, transfer, fence)
                        else:
                            await self._receive(link, link.end, manifest, transfer, fence)
                    return link.reply.transport, turn_s
            finally:
                link.users -= 1
                link.used_s = time.monotonic()

    async def _copy(
        self, link: _ReceiveLink, end: SharedMemoryLink, manifest: Manifest, transfer: BlockTransfer, fence: WriteFence
    ) -> None:
        if self._block_views is None:
            self._block_views = self._view.block_views()
        await end.copy(manifest.block_ids, self._block_views, transfer.block_ids, fence)
        if self._checksum:
            reply = await link.peer.grant(self._grant(link, manifest, checksum=True), self._timeout_s)
            if reply.checksum != await end.checksum(transfer):
                raise TransferError("the KV's checksum does not match")

    async def _receive(
        self, link: _ReceiveLink, end: ProcessGroupLink, manifest: Manifest, transfer: BlockTransfer, fence: WriteFence
    ) -> None:
        checksum = self._checksum if self._checksum is not None else link.reply.transport is Transport.GLOO
        grant = self._grant(link, manifest, checksum)
        link.next_sequence += 1  # the prefill side may not count a grant that fails; a failure closes `end`
        try:
            async with asyncio.TaskGroup() as group:
                # The call is open while bytes move: when the peer dies it fails within milliseconds, while gloo
                # itself would hang until its timeout.
                granting = group.create_task(link.peer.grant(grant, self._timeout_s))
                receiving = group.create_task(end.receive(transfer, fence, checksum))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        reply = granting.result()
        if (reply.sent_bytes, reply.checksum) != (grant.total_bytes, receiving.result()):
            raise TransferError("the KV that arrived is not the KV that was sent")

    def _grant(self, link: _ReceiveLink, manifest: Manifest, checksum: bool) -> Grant:
        return Grant(
            link_id=link.reply.link_id,
            request_id=manifest.request_id,
            epoch=manifest.epoch,
            sequence=link.next_sequence,
            kv_slice=self._kv_slice,
            total_bytes=len(manifest.block_ids) * self._view.block_bytes,
            chunk_bytes=CHUNK_BYTES,
            checksum=checksum,
        )

    def _check_blocks(self, manifest: Manifest, reply: LinkReply, num_blocks: int) -> None:
        blocks = manifest.block_ids
        if len(blocks) != num_blocks or len(set(blocks)) != num_blocks:
            raise TransferError("the manifest has the wrong number of blocks")
        if not all(0 <= block < reply.num_blocks for block in blocks):
            raise TransferError("the manifest names blocks that are not in the prefill worker's pool")
        if manifest.bytes_per_layer != num_blocks * 2 * self._layout.segment_bytes:
            raise TransferError("the manifest has the wrong number of bytes")


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

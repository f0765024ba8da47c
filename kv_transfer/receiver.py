"""Decode's side of KV transfers: fetches a prefill's KV into blocks of its own pools, all of it or none.

Large KV is streamed: what is computed comes while the rest is computed. Streaming is an attempt to have less to do
later. When it fails, the transfer begins anew with the finished prefill.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tandem.core.errors import DeadlineError, InternalError, StaleEpochError, TandemError, TransferError
from tandem.core.kv_codec import KvCodec
from tandem.core.kv_frontier import KvFrontier, TransferChunk
from tandem.core.kv_layout import KvLayout
from tandem.core.log_lines import about
from tandem.core.request import SampledToken
from tandem.core.session import LinkStats
from tandem.core.transfer import ComputedKv, Grant, Manifest, PeerControl, Transport
from tandem.kv_transfer.arrival import ArrivingBlocks, CopyPieces, OwnPools
from tandem.kv_transfer.block_coder import KvCodes
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.fence import WriteFence
from tandem.kv_transfer.incoming import IncomingKv
from tandem.kv_transfer.link_totals import LinkTotals
from tandem.kv_transfer.process_group_link import ProcessGroupLink
from tandem.kv_transfer.receive_links import ReceiveLink, ReceiveLinks, parse_transport
from tandem.kv_transfer.remote_pool import RemotePool
from tandem.kv_transfer.shared_memory_link import SharedMemoryLink

_log = logging.getLogger(__name__)

CHUNK_BYTES = 2 << 20  # in memory; small enough that gathering, sending and scattering overlap
MIN_NEW_BYTES = 2 << 20  # computed since the last call: as many are worth another one
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class FetchResult:
    """KV that has arrived completely and belongs to decode. `seconds` ran from the manifest to the acknowledgement.

    `streamed_bytes` of `bytes` had come before the manifest; the first of them `streamed_s` before.
    """

    manifest: Manifest
    bytes: int
    seconds: float
    transport: Transport
    streamed_bytes: int
    streamed_s: float

    @property
    def first_token(self) -> SampledToken:
        return self.manifest.first_token


class KvReceiver:
    """The decode end of all links of an instance. Lives on the event loop; bytes move in the links' threads, for all
    ranks of the instance.

    `pools`, one per rank, stay the caller's. The first one is a tensor, as are all on this host: contiguous, of any
    dtype, at least `layout.pool_of(rank).pool_bytes`.
    """

    def __init__(
        self,
        layout: KvLayout,
        pools: Sequence[torch.Tensor | RemotePool],
        instance_id: str,
        *,
        transport: Transport | str = "auto",
        checksum: bool | None = None,
        timeout_s: float = 10.0,
        stream_from_bytes: int | None = None,
        copy_pieces: CopyPieces | None = None,
        codec: KvCodec = KvCodec.NONE,
        codes: KvCodes | None = None,
        link_config: LinkConfig | None = None,
    ) -> None:
        """`transport` "auto" takes the fastest possible transport; a named one is taken or is an error. `checksum`
        None checks bytes that came over gloo. `timeout_s` bounds a transfer from its turn on the link to its
        acknowledgement. Transfers of at least `stream_from_bytes` are streamed; None: none are. `copy_pieces`: see
        `OwnPools`. `codec` is for KV that is sent to here, and not for KV that is copied from shared memory. `codes`:
        see `BlockCoder`.

        Raises ConfigError for an unknown transport.
        """
        self._layout = layout
        self._checksum = checksum
        self._timeout_s = timeout_s
        self._stream_from_bytes = stream_from_bytes
        config = link_config or LinkConfig()
        self._close_timeout_s = config.operation_timeout_s(CHUNK_BYTES)
        self._totals = LinkTotals(config.max_links)
        own = OwnPools(layout, pools, copy_pieces)
        self._links = ReceiveLinks(own, instance_id, parse_transport(transport), config, self._totals, codec, codes)

    async def fetch(
        self,
        peer: PeerControl,
        request_id: str,
        epoch: int,
        token_ids: Sequence[int],
        block_ids: Sequence[int],
        deadline_s: float,
    ) -> FetchResult:
        """Copy the KV of the attempt's prefill into `block_ids` of our pools, and take it over once it is finished.

        `token_ids` are those whose KV is expected; `block_ids` are distinct and at least as many as they need, in
        order. `deadline_s` is on `time.monotonic()`, and may be infinite; it bounds every wait.

        When this returns, the blocks hold exactly that KV and the prefill worker has given it up. When it raises,
        cancellation included, the blocks hold anything, but nothing writes to them any more: they may be reused at
        once. Raises `asyncio.CancelledError` only if the task was cancelled, else TransferError (StaleEpochError: the
        lease ended; NoLinkError), IncompatiblePeerError, OverloadedError, PeerGoneError, DeadlineError (`deadline_s`
        has passed), or the error with which the prefill ended. InternalError for block ids that do not fit; nothing is
        written then.
        """
        needed = self._layout.blocks_for(len(token_ids))
        if not len(set(block_ids)) == len(block_ids) >= needed or not all(
            0 <= block < self._layout.num_blocks for block in block_ids
        ):
            raise InternalError(
                f"A fetch of {needed} blocks got blocks that are too few, not distinct or not in the pool"
            )
        incoming = IncomingKv(len(token_ids), block_ids[:needed])
        try:
            async with asyncio.timeout(_remaining_s(deadline_s)):
                link = await self._links.get(peer)  # before the wait: it takes time, and tells whether we fit
                if self._is_streamed(needed):
                    manifest = await self._stream_until_finished(peer, request_id, epoch, link, incoming, deadline_s)
                else:
                    manifest = await peer.pull(request_id, epoch, _remaining_s(deadline_s))
                manifest.check(
                    request_id=request_id, epoch=epoch, token_ids=token_ids, fingerprint=self._layout.fingerprint
                )
                _check_blocks(manifest, incoming.num_tokens, link.plan.source)
                return await self._finish(peer, manifest, incoming)
        except TimeoutError as error:
            raise DeadlineError("the deadline passed before the KV had arrived") from error
        except (RuntimeError, OSError, MemoryError) as error:  # torch's and the system's; another pair may manage
            _log.exception("the KV transfer of %s failed", request_id, extra=about(request_id))
            raise TransferError("the KV transfer failed; the decode worker's log says why") from error
        finally:
            await incoming.fence.close()

    async def can_link(self, peer: PeerControl) -> bool:
        """Whether there is a link to that peer, or one could be made now."""
        try:
            await self._links.get(peer)
        except TandemError as error:
            _log.debug("no link to %s: %s", peer.instance_id, error.message)
            return False
        return True

    def links(self) -> tuple[LinkStats, ...]:
        """Totals per peer (see `LinkTotals`)."""
        return self._totals.stats()

    def drop(self, peer_id: str) -> None:
        """That instance is gone: end its link and forget the instance. Fetches from it fail."""
        self._links.drop(peer_id)

    async def close(self) -> None:
        """End all links and wait for their threads, at most as long as an operation may take."""
        await self._links.close(self._close_timeout_s)

    # --- one transfer ---

    def _is_streamed(self, num_blocks: int) -> bool:
        return self._stream_from_bytes is not None and num_blocks * self._layout.block_bytes >= self._stream_from_bytes

    async def _stream_until_finished(
        self, peer: PeerControl, request_id: str, epoch: int, link: ReceiveLink, incoming: IncomingKv, deadline_s: float
    ) -> Manifest:
        """Bring what is computed until the prefill is finished, or until that fails; wait for the manifest."""
        assert self._stream_from_bytes is not None
        min_new_bytes = min(MIN_NEW_BYTES, self._stream_from_bytes // 2)
        min_new = max(1, min_new_bytes // (2 * link.plan.source.segment_bytes))
        whole = link.plan.whole(incoming.num_tokens)
        while True:
            known = incoming.known
            has_all = known.covers(whole) and not self._checksum  # which comes after the manifest
            timeout_s = _remaining_s(deadline_s)
            kv = await peer.pull_computed(request_id, epoch, known, min_new, has_all, timeout_s)
            if isinstance(kv, Manifest):
                incoming.is_acknowledged = has_all and kv.allocation == known.allocation
                return kv
            try:
                await self._bring_computed(peer, kv, incoming)
            except (TransferError, TimeoutError, DeadlineError) as error:
                _log.info("KV of %s is not streamed: %s", request_id, error, extra=about(request_id))
                self._totals.add(peer.instance_id, failures=1)
                await incoming.restart()
                return await peer.pull(request_id, epoch, _remaining_s(deadline_s))

    async def _bring_computed(self, peer: PeerControl, kv: ComputedKv, incoming: IncomingKv) -> None:
        """Bring what has been computed since the last time. Raises TransferError, TimeoutError or DeadlineError."""
        parts = kv.frontier.beyond(incoming.known_of(kv.allocation))
        if not parts:
            raise TransferError("the prefill worker announced nothing new")
        if kv.allocation != incoming.known.allocation:
            incoming.known, incoming.num_streamed = KvFrontier(), 0
        incoming.transport, turn_s = await self._move(peer, kv, parts, incoming)
        incoming.known = kv.frontier
        incoming.num_streamed += sum(part.num_layer_blocks for part in parts)
        incoming.streaming_s += time.monotonic() - turn_s
        incoming.first_s = turn_s if incoming.first_s is None else incoming.first_s

    async def _finish(self, peer: PeerControl, manifest: Manifest, incoming: IncomingKv) -> FetchResult:
        """Bring what has not come yet, and take the KV over."""
        manifest_s = time.monotonic()
        known = incoming.known_of(manifest.allocation)
        parts = manifest.frontier(self._layout.num_layers).beyond(known)
        if known.allocation == 0:
            incoming.num_streamed, incoming.first_s = 0, None
        transport, turn_s = incoming.transport, manifest_s
        try:
            if parts or transport is None or self._checksum:
                transport, turn_s = await self._move(peer, manifest, parts, incoming)
            timeout_s = turn_s + self._timeout_s - time.monotonic()
            if not incoming.is_acknowledged and not await peer.acknowledge(
                manifest.request_id, manifest.epoch, timeout_s
            ):
                raise StaleEpochError("the KV's lease ended before it had arrived")
        except (TimeoutError, DeadlineError) as error:
            self._totals.add(peer.instance_id, failures=1)
            raise TransferError("the KV did not arrive in time") from error
        except StaleEpochError:
            raise  # nobody waits for it any more: that is no fault of the link
        except TandemError:
            self._totals.add(peer.instance_id, failures=1)
            raise
        end_s = time.monotonic()
        num_bytes = len(incoming.block_ids) * self._layout.block_bytes
        moving_s = incoming.streaming_s + end_s - turn_s
        # A share of our blocks: those of the source may have other sizes.
        streamed_bytes = num_bytes * incoming.num_streamed // (self._layout.num_layers * len(manifest.block_ids))
        self._totals.add(
            peer.instance_id,
            transfers=1,
            nbytes=num_bytes,
            seconds=moving_s,
            streamed_bytes=streamed_bytes,
            wire_bytes=incoming.wire_bytes,
        )
        streamed_s = 0.0 if incoming.first_s is None else manifest_s - incoming.first_s
        return FetchResult(manifest, num_bytes, end_s - manifest_s, transport, streamed_bytes, streamed_s)

    async def _move(
        self, peer: PeerControl, kv: ComputedKv | Manifest, parts: Sequence[TransferChunk], incoming: IncomingKv
    ) -> tuple[Transport, float]:
        """Bring parts of the KV into the blocks. Returns the transport and when their turn came (monotonic)."""
        block_ids, num_tokens, fence = incoming.block_ids, incoming.num_tokens, incoming.fence
        while True:
            link = await self._links.get(peer)
            link.users += 1
            try:
                async with link.turn:
                    if not link.alive:  # the link broke during an earlier turn: not a failure of this transfer
                        continue
                    _check_blocks(kv, num_tokens, link.plan.source)  # of this link: it may have been made anew
                    turn_s = time.monotonic()  # the time-out begins now: earlier transfers do not use it up
                    async with asyncio.timeout(self._timeout_s):
                        if isinstance(link.end, SharedMemoryLink):
                            if parts:
                                await link.end.copy(kv.block_ids, block_ids, num_tokens, parts, fence)
                            if self._checksum and isinstance(kv, Manifest):
                                for arriving in link.plan.arriving(block_ids, num_tokens, CHUNK_BYTES):
                                    await self._compare(link, link.end, kv, arriving)
                        else:
                            for part in parts:
                                for arriving in link.plan.arriving(block_ids, num_tokens, CHUNK_BYTES, part):
                                    await self._receive(link, link.end, kv, arriving, fence)
                                    incoming.wire_bytes += arriving.wire_bytes
                    return link.reply.transport, turn_s
            finally:
                link.users -= 1
                link.used_s = time.monotonic()

    async def _compare(
        self, link: ReceiveLink, end: SharedMemoryLink, manifest: Manifest, arriving: ArrivingBlocks
    ) -> None:
        """Whether the own blocks have what one rank of the source has. Raises TransferError."""
        reply = await link.peer.grant(_grant(link, manifest, arriving, checksum=True), self._timeout_s)
        if reply.checksum != await end.checksum(arriving):
            raise TransferError("the KV's checksum does not match")

    async def _receive(
        self,
        link: ReceiveLink,
        end: ProcessGroupLink,
        kv: ComputedKv | Manifest,
        arriving: ArrivingBlocks,
        fence: WriteFence,
    ) -> None:
        """What one rank of the source has of a part."""
        checksum = self._checksum if self._checksum is not None else link.reply.transport is Transport.GLOO
        grant = _grant(link, kv, arriving, checksum)
        link.next_sequence += 1  # the prefill side may not count a grant that fails; a failure closes `end`
        try:
            async with asyncio.TaskGroup() as group:
                # The call is open while bytes move: when the peer dies it fails within milliseconds, while gloo
                # itself would hang until its timeout.
                granting = group.create_task(link.peer.grant(grant, self._timeout_s))
                receiving = group.create_task(end.receive(arriving, fence, checksum))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        reply = granting.result()
        if (reply.sent_bytes, reply.checksum) != (grant.total_bytes, receiving.result()):
            raise TransferError("the KV that arrived is not the KV that was sent")


def _grant(link: ReceiveLink, kv: ComputedKv | Manifest, arriving: ArrivingBlocks, checksum: bool) -> Grant:
    return Grant(
        link_id=link.reply.link_id,
        request_id=kv.request_id,
        epoch=kv.epoch,
        sequence=link.next_sequence,
        rank=arriving.read.rank,
        allocation=kv.allocation,
        part=arriving.part,
        total_bytes=arriving.wire_bytes,
        chunk_bytes=CHUNK_BYTES,
        checksum=checksum,
        num_tokens=arriving.num_tokens,
    )


def _check_blocks(kv: ComputedKv | Manifest, num_tokens: int, source: KvLayout) -> None:
    """Raises TransferError if the blocks are not in the source's pools, or cannot be those of `num_tokens` tokens."""
    blocks, num_blocks = kv.block_ids, source.blocks_for(num_tokens)
    if kv.block_size != source.block_size:
        raise TransferError("the KV has blocks of another size than the prefill worker's pools")
    if len(blocks) != num_blocks or len(set(blocks)) != num_blocks:
        raise TransferError("the KV has the wrong number of blocks")
    if not all(0 <= block < source.num_blocks for block in blocks):
        raise TransferError("the KV is in blocks that are not in the prefill worker's pools")
    if isinstance(kv, ComputedKv):
        frontier = kv.frontier
        most_blocks = max(stage.next_blocks for stage in frontier.stages)
        if not frontier.is_valid or most_blocks > num_blocks or frontier.known_layers > source.num_layers:
            raise TransferError("more KV is computed than the prefill worker has")


def _remaining_s(deadline_s: float) -> float:
    """Seconds until then, at most a day: gRPC knows no infinite deadline. Raises DeadlineError."""
    remaining_s = deadline_s - time.monotonic()
    if remaining_s <= 0.0:
        raise DeadlineError("the deadline passed before the KV had arrived")
    return min(remaining_s, _DAY_S)

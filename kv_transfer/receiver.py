"""Decode's side of KV transfers: fetches a finished prefill's KV into blocks of its own pools, all of it or none."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tandem.core.errors import DeadlineError, InternalError, StaleEpochError, TandemError, TransferError
from tandem.core.kv_layout import KvLayout
from tandem.core.log_lines import about
from tandem.core.request import SampledToken
from tandem.core.session import LinkStats
from tandem.core.transfer import Grant, Manifest, PeerControl, Transport
from tandem.kv_transfer.arrival import ArrivingBlocks, OwnPools
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.fence import WriteFence
from tandem.kv_transfer.link_totals import LinkTotals
from tandem.kv_transfer.process_group_link import ProcessGroupLink
from tandem.kv_transfer.receive_links import ReceiveLink, ReceiveLinks, parse_transport
from tandem.kv_transfer.shared_memory_link import SharedMemoryLink

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


class KvReceiver:
    """The decode end of all links of an instance. Lives on the event loop; bytes move in the links' threads, for all
    ranks of the instance.

    `pools`, one per rank, stay the caller's: contiguous, of any dtype, at least `layout.pool_of(rank).pool_bytes`.
    """

    def __init__(
        self,
        layout: KvLayout,
        pools: Sequence[torch.Tensor],
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
        self._checksum = checksum
        self._timeout_s = timeout_s
        config = link_config or LinkConfig()
        self._close_timeout_s = config.operation_timeout_s(CHUNK_BYTES)
        self._totals = LinkTotals(config.max_links)
        own = OwnPools(layout, pools)
        self._links = ReceiveLinks(own, instance_id, parse_transport(transport), config, self._totals)

    async def fetch(
        self,
        peer: PeerControl,
        request_id: str,
        epoch: int,
        token_ids: Sequence[int],
        block_ids: Sequence[int],
        deadline_s: float,
    ) -> FetchResult:
        """Wait for the attempt's prefill, copy its KV into `block_ids` of our pools, and take it over.

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
                link = await self._links.get(peer)  # before the wait: it takes time, and tells whether we fit
                manifest = await peer.pull(request_id, epoch, _remaining_s(deadline_s))
                manifest.check(
                    request_id=request_id, epoch=epoch, token_ids=token_ids, fingerprint=self._layout.fingerprint
                )
                _check_blocks(manifest, link.plan.source)
                return await self._transfer(peer, manifest, block_ids, fence)
        except TimeoutError as error:
            raise DeadlineError("the deadline passed before the KV had arrived") from error
        except (RuntimeError, OSError, MemoryError) as error:  # torch's and the system's; another pair may manage
            _log.exception("the KV transfer of %s failed", request_id, extra=about(request_id))
            raise TransferError("the KV transfer failed; the decode worker's log says why") from error
        finally:
            await fence.close()

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
        while True:
            link = await self._links.get(peer)
            link.users += 1
            try:
                async with link.turn:
                    if not link.alive:  # the link broke during an earlier turn: not a failure of this transfer
                        continue
                    _check_blocks(manifest, link.plan.source)  # of this link: it may have been made anew
                    turn_s = time.monotonic()  # the time-out begins now: earlier transfers do not use it up
                    async with asyncio.timeout(self._timeout_s):
                        if isinstance(link.end, SharedMemoryLink):
                            await link.end.copy(manifest.block_ids, block_ids, manifest.num_tokens, fence)
                            if self._checksum:
                                for arriving in _arriving(link, manifest, block_ids):
                                    await self._compare(link, link.end, manifest, arriving)
                        else:
                            for arriving in _arriving(link, manifest, block_ids):
                                await self._receive(link, link.end, manifest, arriving, fence)
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
        self, link: ReceiveLink, end: ProcessGroupLink, manifest: Manifest, arriving: ArrivingBlocks, fence: WriteFence
    ) -> None:
        """What one rank of the source has."""
        checksum = self._checksum if self._checksum is not None else link.reply.transport is Transport.GLOO
        grant = _grant(link, manifest, arriving, checksum)
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


def _arriving(link: ReceiveLink, manifest: Manifest, block_ids: Sequence[int]) -> list[ArrivingBlocks]:
    return link.plan.arriving(block_ids, manifest.num_tokens, CHUNK_BYTES)


def _grant(link: ReceiveLink, manifest: Manifest, arriving: ArrivingBlocks, checksum: bool) -> Grant:
    return Grant(
        link_id=link.reply.link_id,
        request_id=manifest.request_id,
        epoch=manifest.epoch,
        sequence=link.next_sequence,
        rank=arriving.read.rank,
        total_bytes=arriving.total_bytes,
        chunk_bytes=CHUNK_BYTES,
        checksum=checksum,
    )


def _check_blocks(manifest: Manifest, source: KvLayout) -> None:
    """Raises TransferError for blocks that are not those of the manifest's tokens in the source's pools."""
    blocks, num_blocks = manifest.block_ids, source.blocks_for(manifest.num_tokens)
    if manifest.block_size != source.block_size:
        raise TransferError("the manifest has blocks of another size than the prefill worker's pools")
    if len(blocks) != num_blocks or len(set(blocks)) != num_blocks:
        raise TransferError("the manifest has the wrong number of blocks")
    if not all(0 <= block < source.num_blocks for block in blocks):
        raise TransferError("the manifest names blocks that are not in the prefill worker's pools")


def _remaining_s(deadline_s: float) -> float:
    """Seconds until then, at most a day: gRPC knows no infinite deadline. Raises DeadlineError."""
    remaining_s = deadline_s - time.monotonic()
    if remaining_s <= 0.0:
        raise DeadlineError("the deadline passed before the KV had arrived")
    return min(remaining_s, _DAY_S)

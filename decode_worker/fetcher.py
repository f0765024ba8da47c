"""KV that comes from another instance: one task per transfer, on the event loop."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tandem.core.attempt_id import AttemptId
from tandem.core.errors import CancelledError, IncompatiblePeerError, InternalError, TandemError
from tandem.core.log_lines import about
from tandem.core.request import SampledToken
from tandem.core.session import KvSource
from tandem.core.transfer import NoLinkError, PeerGoneError, Transport
from tandem.decode_worker.peers import Peers
from tandem.kv_transfer.receiver import FetchResult, KvReceiver

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fetch:
    """From the loop: blocks are reserved, bring the KV of these tokens into them."""

    attempt_id: AttemptId
    request_id: str
    epoch: int
    token_ids: tuple[int, ...]
    source: KvSource
    block_ids: tuple[int, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class KvArrived:
    """The KV is whole, verified and acknowledged: it is ours."""

    attempt_id: AttemptId
    first_token: SampledToken
    transfer_s: float
    transfer_bytes: int
    transport: Transport
    streamed_bytes: int
    streamed_s: float


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """The transfer failed or was cancelled, and nothing writes into the blocks any more."""

    attempt_id: AttemptId
    error: TandemError


class KvFetcher:
    """`report` is called once for each fetch, however it ended: the blocks are then safe."""

    def __init__(self, report: Callable[[KvArrived | FetchFailed], None], peers: Peers) -> None:
        self._report = report
        self._peers = peers
        self._receiver: KvReceiver | None = None
        self._tasks: dict[AttemptId, asyncio.Task[KvArrived]] = {}

    def fetch_with(self, receiver: KvReceiver) -> None:
        """Called once, before the first fetch: the receiver needs the loaded engine's pool."""
        self._receiver = receiver

    def start(self, fetch: Fetch) -> None:
        task = asyncio.create_task(self._fetch(fetch), name=f"fetch-{fetch.request_id}")
        self._tasks[fetch.attempt_id] = task
        task.add_done_callback(partial(self._ended, fetch))

    def cancel(self, attempt_id: AttemptId) -> None:
        """It is no longer wanted; its end is reported once nothing writes any more."""
        if (task := self._tasks.get(attempt_id)) is not None:
            task.cancel()

    async def close(self) -> None:
        """Cancel all, and wait until nothing writes any more."""
        tasks = list(self._tasks.values())
        for attempt_id in list(self._tasks):
            self.cancel(attempt_id)
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._peers.close()

    async def _fetch(self, fetch: Fetch) -> KvArrived:
        try:
            fetched = await self._receive(fetch)
        except PeerGoneError:
            if not await self._peers.is_there(fetch.source):
                raise
            fetched = await self._receive(fetch)  # the peer still holds the KV
        return KvArrived(
            attempt_id=fetch.attempt_id,
            first_token=fetched.first_token,
            transfer_s=fetched.seconds,
            transfer_bytes=fetched.bytes,
            transport=fetched.transport,
            streamed_bytes=fetched.streamed_bytes,
            streamed_s=fetched.streamed_s,
        )

    async def _receive(self, fetch: Fetch) -> FetchResult:
        assert self._receiver is not None, "a fetch came before the receiver"
        control = self._peers.control(fetch.source)
        try:
            return await self._receiver.fetch(
                control, fetch.request_id, fetch.epoch, fetch.token_ids, fetch.block_ids, fetch.deadline_s
            )
        except NoLinkError:
            self._peers.cannot_link(fetch.source, self._receiver.can_link)
            raise

    def _ended(self, fetch: Fetch, task: asyncio.Task[KvArrived]) -> None:
        """A task that is cancelled before its first step runs none of its own code, so this is a callback."""
        del self._tasks[fetch.attempt_id]
        if task.cancelled():  # only `cancel` does that
            self._report(FetchFailed(fetch.attempt_id, CancelledError("the transfer was cancelled")))
            return
        match task.exception():
            case None:
                self._report(task.result())
            case IncompatiblePeerError() as error:
                log.warning("KV of %s cannot be read here: %s", fetch.source.instance_id, error.message)
                self._report(FetchFailed(fetch.attempt_id, error))
            case TandemError() as error:
                extra = about(fetch.request_id)
                log.info(
                    "transfer of %s (attempt %d) failed: %s", fetch.request_id, fetch.epoch, error.message, extra=extra
                )
                self._report(FetchFailed(fetch.attempt_id, error))
            case error:
                extra = about(fetch.request_id)
                log.error(
                    "transfer of %s (attempt %d) failed", fetch.request_id, fetch.epoch, exc_info=error, extra=extra
                )
                failed = InternalError("the KV transfer failed; the instance's log says why")
                self._report(FetchFailed(fetch.attempt_id, failed))

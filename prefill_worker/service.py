"""The prefill worker on the event loop: routers' sessions, and the leases on finished KV.

The service decides which attempts count; the loop owns the blocks. An attempt is

    live (a router wants it, the loop computes it) -> leased (its KV waits for decode) -> gone

and every way to `gone` posts one `Release` to the loop: acknowledged, cancelled, lease expired, router lost.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from core.clock import Clock
from core.errors import DeadlineError, StaleEpochError, TandemError, error_from_code
from core.session import Cancel, PrefillCommand, PrefillEvent, PrefillFinished, RequestFailed, SubmitPrefill
from core.shipment import Manifest
from prefill_worker.loop import Hold, LoopCommand, LoopEvent, Release, Submit, Tell
from scheduling.leases import LeaseTable
from wire.sessions import Outbox
from worker.attempt_key import Key

log = logging.getLogger(__name__)

LEASE_CHECK_S = 0.25
FORGOTTEN_KEPT = 4096  # how many ended attempts are remembered, to answer late pulls with a reason


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What decode workers call it."""

    request_id: str
    epoch: int


class PrefillService:
    """Implements `wire.sessions.CommandHandler` for routers and `core.transfer.KvHolder` for decode workers."""

    def __init__(self, post: Callable[[LoopCommand], None], lease_s: float, clock: Clock) -> None:
        self._post = post
        self._lease_s = lease_s
        self._clock = clock
        self._outboxes: dict[int, Outbox[PrefillEvent]] = {}
        self._next_session_id = 0
        self._live: dict[Key, _Attempt] = {}
        self._leases = LeaseTable()
        self._leased: dict[_Attempt, tuple[Key, Manifest]] = {}
        self._waiters: dict[_Attempt, asyncio.Future[Manifest]] = {}
        self._ended: dict[_Attempt, TandemError] = {}  # insertion-ordered, bounded

    # --- routers (CommandHandler) ---

    def open_session(self, outbox: Outbox[PrefillEvent]) -> int:
        session_id = self._next_session_id
        self._next_session_id += 1
        self._outboxes[session_id] = outbox
        return session_id

    def handle(self, session_id: int, command: PrefillCommand) -> None:
        match command:
            case SubmitPrefill(handle, request):
                key = Key(session_id, handle)
                self._live[key] = _Attempt(request.request_id, request.epoch)
                self._post(Submit(key, command))
            case Cancel(handle):
                self._cancel(Key(session_id, handle))

    def close_session(self, session_id: int) -> None:
        """The router is gone: what it asked for is dropped, except KV that decode may be fetching under its lease.

        A router that restarts does not know its old requests, so nobody would read the answers.
        """
        del self._outboxes[session_id]
        for key in [key for key in self._live if key.session_id == session_id]:
            self._cancel(key)
        for key, _ in [held for held in self._leased.values() if held[0].session_id == session_id]:
            self._cancel(key)

    def _cancel(self, key: Key) -> None:
        attempt = self._live.pop(key, None)
        if attempt is None:
            attempt = next((a for a, (held, _) in self._leased.items() if held == key), None)
        if attempt is not None:
            self._end(attempt, StaleEpochError("the attempt was cancelled"))
            self._post(Release(key))

    # --- the loop ---

    def deliver(self, events: list[LoopEvent]) -> None:
        """Events of one turn of the loop."""
        for event in events:
            match event:
                case Tell(key, session_event):
                    self._tell(key, session_event)
                case Hold(key, manifest):
                    self._hold(key, manifest)

    def _tell(self, key: Key, event: PrefillEvent) -> None:
        if (attempt := self._live.get(key)) is None:
            return  # cancelled meanwhile
        if isinstance(event, RequestFailed):
            del self._live[key]
            self._end(attempt, error_from_code(event.code, event.message))
        elif isinstance(event, PrefillFinished) and event.finish_reason is not None:
            del self._live[key]
            self._end(attempt, StaleEpochError("the answer was complete with its first token"))
        if (outbox := self._outboxes.get(key.session_id)) is not None:
            outbox.put(event)

    def _hold(self, key: Key, manifest: Manifest) -> None:
        if (attempt := self._live.pop(key, None)) is None:
            return  # cancelled meanwhile: the loop has its Release already
        self._leases.hold(manifest.request_id, manifest.epoch, manifest.block_ids, self._clock.now_s() + self._lease_s)
        self._leased[attempt] = (key, manifest)
        if (waiter := self._waiters.pop(attempt, None)) is not None and not waiter.done():
            waiter.set_result(manifest)

    def _end(self, attempt: _Attempt, reason: TandemError) -> None:
        """The attempt's KV is not to be had any more."""
        self._leased.pop(attempt, None)
        self._leases.drop(attempt.request_id, attempt.epoch)
        self._ended[attempt] = reason
        if len(self._ended) > FORGOTTEN_KEPT:
            del self._ended[next(iter(self._ended))]
        if (waiter := self._waiters.pop(attempt, None)) is not None and not waiter.done():
            waiter.set_exception(reason)
            waiter.exception()  # whoever pulled may have gone; the reason is then nobody's

    # --- decode workers (KvHolder) ---

    async def manifest(self, request_id: str, epoch: int, deadline_s: float) -> Manifest:
        attempt = _Attempt(request_id, epoch)
        if (leased := self._leased.get(attempt)) is not None:
            return leased[1]
        if (reason := self._ended.get(attempt)) is not None:
            raise reason
        waiter = self._waiters.setdefault(attempt, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(deadline_s - self._clock.now_s()):
                return await asyncio.shield(waiter)
        except TimeoutError as error:
            self._waiters.pop(attempt, None)
            raise DeadlineError("the prefill did not finish in time") from error

    async def acknowledge(self, request_id: str, epoch: int) -> bool:
        attempt = _Attempt(request_id, epoch)
        if self._leases.acknowledge(request_id, epoch, self._clock.now_s()) is None:
            return False
        key, _ = self._leased[attempt]
        self._end(attempt, StaleEpochError("the KV was fetched already"))
        self._post(Release(key))
        return True

    # --- leases ---

    async def expire_leases(self) -> None:
        """Until cancelled: KV that nobody fetched in time gives its blocks back."""
        while True:
            await asyncio.sleep(LEASE_CHECK_S)
            for lease in self._leases.expire(self._clock.now_s()):
                attempt = _Attempt(lease.request_id, lease.epoch)
                key, _ = self._leased[attempt]
                log.warning("the lease of %s ended before decode fetched its KV", lease)
                self._end(attempt, StaleEpochError("the lease on the KV has ended"))
                self._post(Release(key))

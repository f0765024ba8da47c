"""The prefill worker on the event loop: routers' sessions, and the leases on finished KV.

The service decides which attempts count; the loop owns the blocks. An attempt is

    live (a router wants it, the loop computes it) -> leased (its KV waits for decode) -> gone

and every way to `gone` posts one `Release` to the loop: acknowledged, cancelled, lease expired, router lost.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from tandem.core.clock import Clock
from tandem.core.errors import DeadlineError, DuplicateRequestError, StaleEpochError, TandemError, error_from_code
from tandem.core.session import Cancel, PrefillCommand, PrefillEvent, PrefillFinished, RequestFailed, SubmitPrefill
from tandem.core.transfer import Manifest
from tandem.prefill_worker.loop import Hold, LoopCommand, LoopEvent, Release, Submit, Tell
from tandem.scheduling.leases import LeaseTable
from tandem.wire.sessions import Outbox
from tandem.worker.attempt_key import Key

log = logging.getLogger(__name__)

LEASE_CHECK_S = 0.25
ENDED_KEPT = 4096  # how many ended attempts are remembered, to answer late pulls with a reason


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
        self._attempts: dict[Key, _Attempt] = {}  # live and leased ones
        self._known: set[_Attempt] = set()  # the same
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
                self._submit(Key(session_id, handle), _Attempt(request.request_id, request.epoch), command)
            case Cancel(handle):
                self._cancel(Key(session_id, handle))

    def close_session(self, session_id: int) -> None:
        """The router is gone: what it asked for is dropped. One that restarts knows nothing of its old requests."""
        del self._outboxes[session_id]
        for key in [key for key in self._attempts if key.session_id == session_id]:
            self._cancel(key)

    def _submit(self, key: Key, attempt: _Attempt, command: SubmitPrefill) -> None:
        if attempt in self._known:  # of another router: ids come from clients
            error = DuplicateRequestError("A request with this id is being served already.")
            self._outboxes[key.session_id].put(RequestFailed(key.handle, error.code, error.message))
            return
        self._attempts[key] = attempt
        self._known.add(attempt)
        self._ended.pop(attempt, None)  # an id that has been used before may be used again
        self._post(Submit(key, command))

    def _cancel(self, key: Key) -> None:
        if key in self._attempts:
            self._end(key, StaleEpochError("the attempt was cancelled"))
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
        if key not in self._attempts:
            return  # cancelled meanwhile
        if isinstance(event, RequestFailed):
            self._end(key, error_from_code(event.code, event.message))
        elif isinstance(event, PrefillFinished) and event.finish_reason is not None:
            self._end(key, StaleEpochError("the answer was complete with its first token"))
        if (outbox := self._outboxes.get(key.session_id)) is not None:
            outbox.put(event)

    def _hold(self, key: Key, manifest: Manifest) -> None:
        if (attempt := self._attempts.get(key)) is None:
            return  # cancelled meanwhile: the loop has its Release already
        expires_s = self._clock.now_s() + self._lease_s
        self._leases.hold(manifest.request_id, manifest.epoch, manifest.block_ids, expires_s)
        self._leased[attempt] = (key, manifest)
        if (waiter := self._waiters.pop(attempt, None)) is not None and not waiter.done():
            waiter.set_result(manifest)

    def _end(self, key: Key, reason: TandemError) -> None:
        """The attempt's KV is not to be had any more."""
        attempt = self._attempts.pop(key)
        self._known.discard(attempt)
        self._leased.pop(attempt, None)
        self._leases.drop(attempt.request_id, attempt.epoch)
        self._ended[attempt] = reason
        if len(self._ended) > ENDED_KEPT:
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
        self._end(key, StaleEpochError("the KV was fetched already"))
        self._post(Release(key))
        return True

    # --- leases ---

    async def expire_leases(self) -> None:
        """Until cancelled: KV that nobody fetched in time gives its blocks back."""
        while True:
            await asyncio.sleep(LEASE_CHECK_S)
            for lease in self._leases.expire(self._clock.now_s()):
                key, _ = self._leased[_Attempt(lease.request_id, lease.epoch)]
                log.warning("the lease of %s ended before decode fetched its KV", lease)
                self._end(key, StaleEpochError("the lease on the KV has ended"))
                self._post(Release(key))

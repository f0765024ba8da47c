"""KV that is computed and held for another instance: who may still have it, and until when.

An attempt that is to be handed over is

    open (its prompt waits or is computed) -> leased (its KV waits for the reader) -> closed

This object lives on the event loop and decides which attempts count, so that an acknowledgement never waits for a step.
The loop thread owns the blocks and frees them after it is told (docs/decisions/0002).
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from tandem.core.attempt_id import AttemptId
from tandem.core.clock import Clock
from tandem.core.errors import DeadlineError, DuplicateRequestError, StaleEpochError, TandemError
from tandem.core.log_lines import about
from tandem.core.transfer import Manifest
from tandem.scheduling.leases import LeaseTable

log = logging.getLogger(__name__)

LEASE_CHECK_S = 0.25
CLOSED_KEPT = 512  # closed attempts that are remembered, to answer late pulls with a reason


@dataclass(frozen=True, slots=True)
class KvReady:
    """From the loop: the attempt's KV is complete and stays until the loop is told to release it."""

    attempt_id: AttemptId
    manifest: Manifest


_Name = tuple[str, int]  # request id and epoch: how readers name an attempt


class HeldKv:
    """Implements `core.transfer.KvHolder` for readers."""

    def __init__(self, release: Callable[[AttemptId], None], lease_s: float, clock: Clock) -> None:
        """`release` is called once for each attempt whose lease has ended, acknowledged or not."""
        self._release = release
        self._lease_s = lease_s
        self._clock = clock
        self._names: dict[AttemptId, _Name] = {}  # open and leased
        self._ids: dict[_Name, AttemptId] = {}  # the same
        self._leases = LeaseTable()
        self._manifests: dict[_Name, Manifest] = {}  # of the leased
        self._waiters: dict[_Name, set[asyncio.Future[Manifest]]] = {}
        self._closed: dict[_Name, TandemError] = {}  # insertion-ordered, bounded

    # --- the session service -----------------------------------------------------------------------------------------

    def open(self, attempt_id: AttemptId, request_id: str, epoch: int) -> None:
        """Raises DuplicateRequestError if another router's attempt has the same name: request ids come from clients."""
        name = (request_id, epoch)
        if name in self._ids:
            raise DuplicateRequestError("A request with this id is being served already.")
        self._names[attempt_id], self._ids[name] = name, attempt_id
        self._closed.pop(name, None)  # a request id may be used again

    def hold(self, ready: KvReady) -> None:
        """Begin the lease, unless the attempt was closed meanwhile: the loop has its release already."""
        name = self._names.get(ready.attempt_id)
        if name is None:
            return
        manifest = ready.manifest
        self._leases.hold(*name, manifest.block_ids, self._clock.now_s() + self._lease_s)
        self._manifests[name] = manifest
        for waiter in self._waiters.pop(name, ()):
            if not waiter.done():
                waiter.set_result(manifest)

    def renew(self, attempt_id: AttemptId) -> None:
        """Its reader still waits for memory: the lease begins anew. Ignored if the attempt has no lease."""
        if (name := self._names.get(attempt_id)) is not None:
            self._leases.renew(*name, self._clock.now_s() + self._lease_s)

    def close(self, attempt_id: AttemptId, reason: TandemError) -> None:
        """The attempt's KV is not to be had any more. Does nothing if the attempt is not open here."""
        name = self._names.pop(attempt_id, None)
        if name is None:
            return
        del self._ids[name]
        self._manifests.pop(name, None)
        self._leases.drop(*name)
        self._closed[name] = reason
        if len(self._closed) > CLOSED_KEPT:
            del self._closed[next(iter(self._closed))]
        for waiter in self._waiters.pop(name, ()):
            if not waiter.done():
                waiter.set_exception(reason)
                waiter.exception()  # the reader may have gone; the reason is then nobody's

    # --- readers (KvHolder) ------------------------------------------------------------------------------------------

    async def manifest(self, request_id: str, epoch: int, deadline_s: float) -> Manifest:
        name = (request_id, epoch)
        if (manifest := self._manifests.get(name)) is not None:
            return manifest
        if (reason := self._closed.get(name)) is not None:
            raise reason
        waiter: asyncio.Future[Manifest] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(name, set()).add(waiter)
        try:
            async with asyncio.timeout(deadline_s - self._clock.now_s()):
                return await waiter
        except TimeoutError as error:
            raise DeadlineError("the prefill did not finish in time") from error
        finally:  # also when the reader went away
            if (waiting := self._waiters.get(name)) is not None:
                waiting.discard(waiter)
                if not waiting:
                    del self._waiters[name]

    async def acknowledge(self, request_id: str, epoch: int) -> bool:
        if self._leases.acknowledge(request_id, epoch, self._clock.now_s()) is None:
            return False
        self._end(request_id, epoch, StaleEpochError("the KV was fetched already"))
        return True

    # --- leases ------------------------------------------------------------------------------------------------------

    async def expire_leases(self) -> None:
        """Until cancelled: KV that nobody fetched in time gives its blocks back."""
        while True:
            await asyncio.sleep(LEASE_CHECK_S)
            for lease in self._leases.expire(self._clock.now_s()):
                log.warning("the lease of %s ended before its KV was fetched", lease, extra=about(lease.request_id))
                self._end(lease.request_id, lease.epoch, StaleEpochError("the lease on the KV has ended"))

    def _end(self, request_id: str, epoch: int, reason: TandemError) -> None:
        attempt_id = self._ids[request_id, epoch]
        self.close(attempt_id, reason)
        self._release(attempt_id)

"""KV that is computed and held for another instance: which readers may fetch it, and until when.

An attempt that is to be handed over is

    open (its prompt waits or is computed) -> leased (its KV waits for the reader) -> closed

A reader may read the KV that is computed already. Nothing protects that KV yet: it is valid once the attempt is leased,
and only if the attempt has kept its blocks until then.

This object lives on the event loop and decides which attempts count, so that an acknowledgement never waits for a step.
The loop thread owns the blocks and frees them after it is told (docs/decisions/0002).
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tandem.core.attempt_id import AttemptId
from tandem.core.clock import Clock
from tandem.core.errors import DeadlineError, DuplicateRequestError, StaleEpochError, TandemError
from tandem.core.kv_frontier import KvFrontier, StageFrontier
from tandem.core.log_lines import about
from tandem.core.transfer import ComputedKv, Manifest
from tandem.scheduling.leases import LeaseTable

log = logging.getLogger(__name__)

LEASE_CHECK_S = 0.25
CLOSED_KEPT = 512  # closed attempts that are remembered, to answer late pulls with a reason


@dataclass(frozen=True, slots=True)
class KvReady:
    """From the loop: the attempt's KV is complete and stays until the loop is told to release it."""

    attempt_id: AttemptId
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class KvComputing:
    """From the loop: a chunk of the attempt's prompt is in the next step.

    Of `block_ids`, which are all blocks of the attempt, the first `blocks` are computed, and the chunk completes those
    up to `next_blocks`. `is_first`: the attempt has just been given these blocks. `step` is the number of that step,
    and `layers_per_stage` are the layers of the pipeline stages whose progress is known.
    """

    attempt_id: AttemptId
    block_ids: tuple[int, ...]
    block_size: int
    is_first: bool
    blocks: int
    next_blocks: int
    step: int
    layers_per_stage: tuple[int, ...]


class StageStep(NamedTuple):
    """How far a pipeline stage is: it computes a step, or has computed it, and `layers` of the step are done."""

    step: int
    layers: int


_Name = tuple[str, int]  # request id and epoch: how readers name an attempt
_Kv = ComputedKv | Manifest


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    """A reader. `known` None: it waits for the manifest; else for `min_new` blocks of one layer beyond `known`."""

    answer: asyncio.Future[_Kv]
    known: KvFrontier | None = None
    min_new: int = 0

    def wants(self, kv: _Kv) -> bool:
        if isinstance(kv, Manifest):
            return True
        if self.known is None:
            return False
        known = self.known if self.known.allocation == kv.allocation else KvFrontier()
        num_new = sum(chunk.num_layer_blocks for chunk in kv.frontier.beyond(known))
        return num_new >= self.min_new or (num_new > 0 and kv.is_complete)


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
        self._kv: dict[_Name, _Kv] = {}  # what there is: of the leased a manifest, of those that are computed a part
        self._streamed: set[_Name] = set()  # those that are computed and have a reader already
        self._chunks: dict[_Name, list[KvComputing]] = {}  # of those that are computed, since they have their blocks
        self._stages: dict[int, StageStep] = {}  # how far later pipeline stages are, by number
        self._waiters: dict[_Name, set[_Waiter]] = {}
        self._closed: dict[_Name, TandemError] = {}  # insertion-ordered, bounded

    # --- the session service -----------------------------------------------------------------------------------------

    def open(self, attempt_id: AttemptId, request_id: str, epoch: int) -> None:
        """Raises DuplicateRequestError if another router's attempt has the same name: request ids come from clients."""
        name = (request_id, epoch)
        if name in self._ids:
            raise DuplicateRequestError("A request with this id is being served already.")
        self._names[attempt_id], self._ids[name] = name, attempt_id
        self._closed.pop(name, None)  # a request id may be used again
        if any(waiter.known is not None for waiter in self._waiters.get(name, ())):
            self._streamed.add(name)

    @property
    def wants_layers(self) -> bool:
        """Whether `layers_computed` is of use now. From any thread."""
        return bool(self._streamed)

    def computing(self, event: KvComputing) -> None:
        """A step with a chunk of the attempt begins."""
        if (name := self._names.get(event.attempt_id)) is not None:
            earlier = self._kv.get(name)
            allocation = (0 if earlier is None else earlier.allocation) + event.is_first
            chunks = self._chunks[name] = [event] if event.is_first else [*self._chunks.get(name, ()), event]
            first, *others = event.layers_per_stage
            later = tuple(
                _of_stage(chunks, num_layers, self._stages.get(number))
                for number, num_layers in enumerate(others, start=1)
            )
            frontier = KvFrontier(allocation, event.blocks, event.next_blocks, 0, first, later)
            self._announce(name, ComputedKv(*name, event.block_ids, event.block_size, frontier))

    def layers_computed(self, num_layers: int) -> None:
        """The step in progress has written the KV of the first `num_layers` layers of the first stage.

        Attempts that are not in this step have all layers of their last chunk, so that it is true for them, too.
        """
        for name in self._streamed:
            kv = self._kv.get(name)
            if isinstance(kv, ComputedKv) and kv.frontier.layers < num_layers:
                self._announce(name, replace(kv, frontier=replace(kv.frontier, layers=num_layers)))

    def stage_computed(self, number: int, at: StageStep) -> None:
        """A later stage is there: it has written the KV of all earlier steps, and of its layers of this one."""
        self._stages[number] = at
        for name in self._streamed:
            kv = self._kv.get(name)
            if isinstance(kv, ComputedKv) and number <= len(kv.frontier.later):
                later = list(kv.frontier.later)
                later[number - 1] = _of_stage(self._chunks[name], later[number - 1].num_layers, at)
                if tuple(later) != kv.frontier.later:
                    self._announce(name, replace(kv, frontier=replace(kv.frontier, later=tuple(later))))

    def hold(self, ready: KvReady) -> None:
        """Begin the lease, unless the attempt was closed meanwhile: the loop has its release already."""
        name = self._names.get(ready.attempt_id)
        if name is None:
            return
        manifest = ready.manifest
        if (computed := self._kv.get(name)) is not None:
            manifest = replace(manifest, allocation=computed.allocation)
        self._leases.hold(*name, manifest.block_ids, self._clock.now_s() + self._lease_s)
        self._streamed.discard(name)
        self._chunks.pop(name, None)
        self._announce(name, manifest)

    def renew(self, attempt_id: AttemptId) -> None:
        """Its reader still waits for memory: the lease begins anew. Ignored if the attempt has no lease."""
        if (name := self._names.get(attempt_id)) is not None:
            self._leases.renew(*name, self._clock.now_s() + self._lease_s)

    def close(self, attempt_id: AttemptId, reason: TandemError) -> None:
        """The attempt's KV cannot be fetched any more. No effect if the attempt is not open."""
        name = self._names.pop(attempt_id, None)
        if name is None:
            return
        del self._ids[name]
        self._kv.pop(name, None)
        self._streamed.discard(name)
        self._chunks.pop(name, None)
        self._leases.drop(*name)
        self._closed[name] = reason
        if len(self._closed) > CLOSED_KEPT:
            del self._closed[next(iter(self._closed))]
        for waiter in self._waiters.pop(name, ()):
            if not waiter.answer.done():
                waiter.answer.set_exception(reason)
                waiter.answer.exception()  # the reader may have gone; the reason is then nobody's

    # --- readers (KvHolder) ------------------------------------------------------------------------------------------

    async def manifest(self, request_id: str, epoch: int, deadline_s: float) -> Manifest:
        kv = await self._wait((request_id, epoch), _Waiter(asyncio.get_running_loop().create_future()), deadline_s)
        assert isinstance(kv, Manifest), "what this waiter wants"
        return kv

    async def computed(
        self, request_id: str, epoch: int, known: KvFrontier, min_new: int, has_all: bool, deadline_s: float
    ) -> _Kv:
        name = (request_id, epoch)
        if name in self._ids and not isinstance(self._kv.get(name), Manifest):
            self._streamed.add(name)  # until it is leased or closed: layers that come between two calls count, too
        waiter = _Waiter(asyncio.get_running_loop().create_future(), known, min_new)
        kv = await self._wait(name, waiter, deadline_s)
        is_taken = has_all and isinstance(kv, Manifest) and kv.allocation == known.allocation
        if is_taken and not await self.acknowledge(request_id, epoch):
            raise StaleEpochError("the lease on the KV has ended")
        return kv

    def readable(self, request_id: str, epoch: int) -> _Kv:
        name = (request_id, epoch)
        if (kv := self._kv.get(name)) is None:
            raise self._closed.get(name) or StaleEpochError("no KV of the attempt is here")
        return kv

    async def acknowledge(self, request_id: str, epoch: int) -> bool:
        if self._leases.acknowledge(request_id, epoch, self._clock.now_s()) is None:
            return False
        self._end(request_id, epoch, StaleEpochError("the KV was fetched already"))
        return True

    # --- leases ------------------------------------------------------------------------------------------------------

    async def expire_leases(self) -> None:
        """Until cancelled: free the blocks of KV that no reader has fetched in time."""
        while True:
            await asyncio.sleep(LEASE_CHECK_S)
            for lease in self._leases.expire(self._clock.now_s()):
                request_id, epoch = lease.request_id, lease.epoch
                extra = about(request_id)
                log.warning(
                    "the lease of %s (attempt %d) ended before its KV was fetched", request_id, epoch, extra=extra
                )
                self._end(request_id, epoch, StaleEpochError("the lease on the KV has ended"))

    def _announce(self, name: _Name, kv: _Kv) -> None:
        """What there is of the attempt's KV has changed."""
        self._kv[name] = kv
        for waiter in self._waiters.get(name, ()):
            if not waiter.answer.done() and waiter.wants(kv):
                waiter.answer.set_result(kv)

    async def _wait(self, name: _Name, waiter: _Waiter, deadline_s: float) -> _Kv:
        """Until there is what it wants."""
        if (kv := self._kv.get(name)) is not None and waiter.wants(kv):
            return kv
        if (reason := self._closed.get(name)) is not None:
            raise reason
        self._waiters.setdefault(name, set()).add(waiter)
        try:
            async with asyncio.timeout(deadline_s - self._clock.now_s()):
                return await waiter.answer
        except TimeoutError as error:
            raise DeadlineError("the prefill did not finish in time") from error
        finally:  # also when the reader went away
            if (waiting := self._waiters.get(name)) is not None:
                waiting.discard(waiter)
                if not waiting:
                    del self._waiters[name]

    def _end(self, request_id: str, epoch: int, reason: TandemError) -> None:
        attempt_id = self._ids[request_id, epoch]
        self.close(attempt_id, reason)
        self._release(attempt_id)


def _of_stage(chunks: Sequence[KvComputing], num_layers: int, at: StageStep | None) -> StageFrontier:
    """What a later stage has computed of an attempt with these chunks, which are in the order of their steps.

    Steps come one after the other in every stage. So cached blocks are there when the stage begins the attempt's first
    step: earlier steps wrote them.
    """
    begun = [chunk for chunk in chunks if at is not None and chunk.step <= at.step]
    if at is None or not begun:
        return StageFrontier(num_layers=num_layers)
    last = begun[-1]
    return StageFrontier(last.blocks, last.next_blocks, at.layers if last.step == at.step else num_layers, num_layers)

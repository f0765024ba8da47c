"""Sessions, leases and acknowledgements, in any order in which they may come."""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace

import pytest

from tandem.core.attempt_id import AttemptId
from tandem.core.clock import ManualClock
from tandem.core.errors import ConfigError, DeadlineError, OverloadedError, StaleEpochError
from tandem.core.instance_section import InstanceSection
from tandem.core.kv_frontier import KvFrontier, StageFrontier
from tandem.core.request import FinishReason, GenerationRequest, SampledToken
from tandem.core.session import (
    Cancel,
    KvSource,
    NewTokens,
    PrefillFinished,
    RenewLease,
    RequestFailed,
    Role,
    SessionEvent,
    Submit,
    TokenFrame,
)
from tandem.core.transfer import ComputedKv, Manifest
from tandem.decode_worker.fetcher import Fetch
from tandem.prefill_worker.held_kv import HeldKv, KvComputing, KvReady, StageStep
from tandem.scheduling.budget import StepBudget
from tandem.wire.sessions import Outbox, RoleChange
from tandem.worker.loop_messages import CancelFetch, LoopCommand, Release, SendEvent, SubmitAttempt
from tandem.worker.service import InstanceService

REQUEST = GenerationRequest("r", (1, 2, 3), epoch=1)
MANIFEST = Manifest("r", 1, 3, "hash", (7,), "layout", 64, SampledToken(5))


class Bench:
    """A service with one router connected; what it posts to the loop is kept."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.posted: list[LoopCommand] = []
        self.held = HeldKv(lambda attempt_id: self.service.release_held(attempt_id), 10.0, self.clock)
        self.fetches: list[object] = []
        self.num_role_changes = 0
        self.cache_changes: list[object] = []
        self.routers: list[str] = []
        self.service = InstanceService(
            Role.PREFILL,
            InstanceSection(),
            self.posted.append,
            self.held,
            self,
            self._role_changed,
            self.cache_changes.append,
            self.routers.extend,
        )
        self.outbox = Outbox()
        self.session = self.service.open_session(self.outbox)
        self.key = AttemptId(self.session, 1)

    def _role_changed(self) -> None:
        self.num_role_changes += 1

    # In the fetcher's place:

    def start(self, fetch: Fetch) -> None:
        self.fetches.append(fetch)

    def cancel(self, attempt_id: AttemptId) -> None:
        self.fetches.append(attempt_id)

    async def sent(self) -> list[SessionEvent]:
        self.outbox.close()
        return [event async for event in self.outbox.drain()]

    def submit(self) -> None:
        self.service.handle(self.session, Submit(1, REQUEST, hand_over=True))

    def hold(self) -> None:
        self.service.deliver([KvReady(self.key, MANIFEST)])

    def pull(self, deadline_s: float = 5.0) -> Awaitable[Manifest]:
        return self.held.manifest("r", 1, self.clock.now_s() + deadline_s)

    @property
    def releases(self) -> list[AttemptId]:
        return [command.attempt_id for command in self.posted if isinstance(command, Release)]


async def test_a_pull_waits_for_its_prefill_and_is_acknowledged_once() -> None:
    bench = Bench()
    early = asyncio.ensure_future(bench.pull())  # before the attempt is known
    await asyncio.sleep(0)
    bench.submit()
    assert [type(command) for command in bench.posted] == [SubmitAttempt]
    bench.hold()
    assert await early == MANIFEST
    assert await bench.pull() == MANIFEST
    assert await bench.held.acknowledge("r", 1)
    assert bench.releases == [bench.key]
    assert not await bench.held.acknowledge("r", 1)
    with pytest.raises(StaleEpochError):
        await bench.pull()
    assert bench.releases == [bench.key]


async def test_another_epoch_is_another_attempt() -> None:
    bench = Bench()
    bench.submit()
    bench.hold()
    assert not await bench.held.acknowledge("r", 0)
    with pytest.raises(DeadlineError):
        await bench.held.manifest("r", 2, 0.01)
    assert await bench.held.acknowledge("r", 1)


async def test_after_a_cancel_nothing_is_handed_out_even_if_the_loop_was_faster() -> None:
    bench = Bench()
    bench.submit()
    waiting = asyncio.ensure_future(bench.pull())
    await asyncio.sleep(0)
    bench.service.handle(bench.session, Cancel(1))
    bench.hold()  # was on its way when the cancel came
    with pytest.raises(StaleEpochError):
        await waiting
    assert not await bench.held.acknowledge("r", 1)
    assert bench.releases == [bench.key]


async def test_an_expired_lease_refuses_the_acknowledgement_before_and_after_it_is_swept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench()
    bench.submit()
    bench.hold()
    bench.clock.advance(10.0)
    assert not await bench.held.acknowledge("r", 1)
    sweeping = asyncio.create_task(bench.held.expire_leases())
    async with asyncio.timeout(5):
        while not bench.releases:  # noqa: ASYNC110 - the sweep has its own pace
            await asyncio.sleep(0.05)
    sweeping.cancel()
    assert [record.message for record in caplog.records if "lease" in record.message] == [
        "the lease of r (attempt 1) ended before its KV was fetched"
    ], "without the ids of its blocks, which may be thousands"
    with pytest.raises(StaleEpochError, match="lease"):
        await bench.pull()
    assert not await bench.held.acknowledge("r", 1)


async def test_a_renewed_lease_is_in_force_for_longer() -> None:
    bench = Bench()
    bench.submit()
    bench.service.handle(bench.session, RenewLease(1))  # nothing is held yet
    bench.hold()
    for _ in range(3):
        bench.clock.advance(6.0)
        bench.service.handle(bench.session, RenewLease(1))
    assert await bench.held.acknowledge("r", 1)
    bench.service.handle(bench.session, RenewLease(1))
    assert bench.releases == [bench.key]
    assert not await bench.held.acknowledge("r", 1)


async def test_the_attempts_of_a_lost_router_end_in_every_phase() -> None:
    bench = Bench()
    bench.submit()
    bench.hold()
    bench.service.handle(bench.session, Submit(2, GenerationRequest("other", (1,)), hand_over=True))
    bench.service.close_session(bench.session)
    assert sorted(key.handle for key in bench.releases) == [1, 2]
    assert not await bench.held.acknowledge("r", 1)
    bench.service.deliver([KvReady(AttemptId(bench.session, 2), MANIFEST)])
    assert not await bench.held.acknowledge("r", 1)


async def test_a_reader_of_an_ended_attempt_gets_the_reason() -> None:
    bench = Bench()
    bench.submit()
    bench.service.deliver([SendEvent(bench.session, RequestFailed(1, "overloaded", "full"))])
    with pytest.raises(OverloadedError, match="full"):
        await bench.pull()
    bench.service.handle(bench.session, Submit(3, GenerationRequest("short", (1,)), hand_over=True))
    finished = PrefillFinished(3, SampledToken(5), None, FinishReason.STOP, 0, 0.0)
    bench.service.deliver([SendEvent(bench.session, finished)])
    with pytest.raises(StaleEpochError, match="complete"):
        await bench.held.manifest("short", 0, bench.clock.now_s() + 5.0)
    assert bench.releases == []


class Reading:
    """A reader that takes what is computed of `bench`'s attempt, in blocks 7, 8 and 9 with four layers each."""

    def __init__(self, bench: Bench, layers_per_stage: tuple[int, ...] = (4,)) -> None:
        self.bench = bench
        self.layers_per_stage = layers_per_stage

    def computing(self, blocks: int, next_blocks: int, *, is_first: bool = False, step: int = 1) -> None:
        event = KvComputing(
            self.bench.key, (7, 8, 9), 64, is_first, blocks, next_blocks, step, layers_per_stage=self.layers_per_stage
        )
        self.bench.service.deliver([event])

    def pull(
        self, known: KvFrontier, min_new: int = 1, *, has_all: bool = False
    ) -> "asyncio.Future[ComputedKv | Manifest]":
        deadline_s = self.bench.clock.now_s() + 5.0
        return asyncio.ensure_future(self.bench.held.computed("r", 1, known, min_new, has_all, deadline_s))


async def frontier_of(pulled: "asyncio.Future[ComputedKv | Manifest]") -> KvFrontier:
    kv = await pulled
    assert isinstance(kv, ComputedKv)
    assert (kv.request_id, kv.epoch, kv.block_ids, kv.block_size) == ("r", 1, (7, 8, 9), 64)
    return kv.frontier


async def test_a_reader_learns_what_is_computed_once_it_is_enough() -> None:
    bench = Bench()
    reading, held = Reading(bench), bench.held
    early = reading.pull(KvFrontier())  # before the attempt is known
    await asyncio.sleep(0)
    assert not held.wants_layers
    bench.submit()
    assert held.wants_layers
    reading.computing(0, 2, is_first=True)
    held.layers_computed(1)
    known = KvFrontier(1, 0, 2, 1, 4)
    assert await frontier_of(early) == known
    held.layers_computed(2)
    waiting = reading.pull(known, min_new=5)  # it has two blocks of one layer
    await asyncio.sleep(0)
    held.layers_computed(3)
    assert not waiting.done()
    held.layers_computed(4)
    known = KvFrontier(1, 0, 2, 4, 4)
    assert await frontier_of(waiting) == known
    reading.computing(2, 3)
    waiting = reading.pull(known, min_new=100)
    await asyncio.sleep(0)
    held.layers_computed(3)
    assert not waiting.done()
    held.layers_computed(4)  # the last ones: no more will come
    known = KvFrontier(1, 2, 3, 4, 4)
    assert await frontier_of(waiting) == known
    waiting = reading.pull(known)
    bench.hold()
    assert await waiting == held.readable("r", 1) == replace(MANIFEST, allocation=1)
    assert not held.wants_layers


async def test_a_reader_learns_how_far_later_stages_are() -> None:
    """Two stages of four and three layers. The second one is a step behind."""
    bench = Bench()
    reading, held = Reading(bench, layers_per_stage=(4, 3)), bench.held
    bench.submit()
    held.stage_computed(1, StageStep(4, 3))
    reading.computing(1, 2, is_first=True, step=5)  # the first block was cached
    known = KvFrontier(1, 1, 2, 0, 4, (StageFrontier(0, 0, 0, 3),))
    assert await frontier_of(reading.pull(KvFrontier())) == known
    waiting = reading.pull(known)
    await asyncio.sleep(0)
    held.stage_computed(1, StageStep(5, 0))  # which wrote the cached block in an earlier step
    known = replace(known, later=(StageFrontier(1, 2, 0, 3),))
    assert await frontier_of(waiting) == known
    held.layers_computed(4)
    held.stage_computed(1, StageStep(5, 2))
    reading.computing(2, 3, step=7)  # another attempt was in step 6
    known = KvFrontier(1, 2, 3, 0, 4, (StageFrontier(1, 2, 2, 3),))
    assert held.readable("r", 1) == ComputedKv("r", 1, (7, 8, 9), 64, known)
    held.stage_computed(1, StageStep(6, 1))
    held.layers_computed(4)
    waiting = reading.pull(known, min_new=8)
    await asyncio.sleep(0)
    held.stage_computed(1, StageStep(7, 2))
    assert not waiting.done()
    held.stage_computed(1, StageStep(7, 3))
    known = KvFrontier(1, 2, 3, 4, 4, (StageFrontier(2, 3, 3, 3),))
    assert await frontier_of(waiting) == known


async def test_a_reader_that_has_all_is_answered_and_acknowledged_at_once() -> None:
    for is_preempted in (False, True):
        bench = Bench()
        reading = Reading(bench)
        bench.submit()
        reading.computing(2, 3, is_first=True)
        waiting = reading.pull(KvFrontier(1, 2, 3, 4, 4), has_all=True)
        await asyncio.sleep(0)
        if is_preempted:
            reading.computing(0, 0, is_first=True)
        bench.hold()
        assert (await waiting).allocation == 1 + is_preempted
        assert bench.releases == [bench.key][is_preempted:]
        assert await bench.held.acknowledge("r", 1) is is_preempted


async def test_a_reader_hears_of_other_blocks_and_of_the_end() -> None:
    bench = Bench()
    reading, held = Reading(bench), bench.held
    bench.submit()
    with pytest.raises(StaleEpochError):
        held.readable("r", 1)
    reading.computing(2, 3, is_first=True)
    known = KvFrontier(1, 2, 3, 0, 4)
    assert await frontier_of(reading.pull(KvFrontier())) == known
    reading.computing(2, 3, is_first=True)  # preempted and admitted again
    before, known = known, KvFrontier(2, 2, 3, 0, 4)
    assert await frontier_of(reading.pull(before, min_new=8)) == known
    waiting = reading.pull(known)
    await asyncio.sleep(0)
    bench.service.handle(bench.session, Cancel(1))
    with pytest.raises(StaleEpochError, match="cancelled"):
        await waiting
    with pytest.raises(StaleEpochError, match="cancelled"):
        held.readable("r", 1)
    reading.computing(2, 3)  # was on its way
    held.layers_computed(4)
    assert not held.wants_layers
    assert not held._waiters
    assert not held._kv


async def test_an_id_may_be_used_again_once_it_is_over_and_not_before() -> None:
    bench = Bench()
    bench.submit()
    other = Outbox()
    other_session = bench.service.open_session(other)
    bench.service.handle(other_session, Submit(9, REQUEST, hand_over=True))
    other.close()
    assert [event async for event in other.drain()] == [
        RequestFailed(9, "already_exists", "A request with this id is being served already.")
    ]
    bench.service.handle(bench.session, Cancel(1))
    bench.submit()
    bench.hold()
    assert await bench.pull() == MANIFEST


async def test_a_reader_that_goes_away_leaves_no_state() -> None:
    bench = Bench()
    waiting = asyncio.ensure_future(bench.pull())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not bench.held._waiters


async def test_an_attempt_is_forgotten_with_its_last_event_whatever_it_is() -> None:
    bench = Bench()
    request = GenerationRequest("r", (1,))
    for handle in (1, 2, 3):
        bench.service.handle(bench.session, Submit(handle, request, KvSource("prefill-1", "127.0.0.1:1")))
    assert not bench.service.is_idle
    frame = TokenFrame((NewTokens(1, (SampledToken(5),), FinishReason.STOP), NewTokens(2, (SampledToken(5),))))
    bench.service.deliver([SendEvent(bench.session, frame)])
    bench.service.deliver([SendEvent(bench.session, RequestFailed(2, "unavailable", "gone"))])
    bench.service.handle(bench.session, Cancel(3))
    assert not bench.service.is_idle, "the events are not written"
    bench.service.end_sessions()
    assert len([event async for event in bench.outbox.drain()]) == 2
    assert bench.service.is_idle
    bench.service.close_session(bench.session)
    assert bench.releases == [AttemptId(bench.session, 3)], "an attempt that has ended was released again"


async def test_fetches_go_to_the_fetcher_and_events_to_their_router() -> None:
    bench = Bench()
    fetch = Fetch(bench.key, "r", 1, (1, 2, 3), KvSource("prefill-1", "127.0.0.1:1"), (7,), 5.0)
    bench.service.deliver(
        [fetch, CancelFetch(bench.key), SendEvent(77, RequestFailed(1, "x", "of a router that is gone"))]
    )
    assert bench.fetches == [fetch, bench.key]
    assert await bench.sent() == []


async def test_a_role_changes_with_its_bounds_while_the_instance_runs() -> None:
    bench = Bench()
    bench.service.configure(RoleChange(Role.COLOCATED, max_batch=3, max_prefill_tokens=40))
    (budget,) = bench.posted
    assert isinstance(budget, StepBudget)
    assert (budget.max_batch, budget.max_prefill_tokens) == (3, 40)
    assert (bench.service.role, bench.num_role_changes) == (Role.COLOCATED, 1)
    with pytest.raises(ConfigError, match="max_batch must be at least 1, not 0"):
        bench.service.configure(RoleChange(Role.DECODE, max_batch=0))
    assert bench.service.role is Role.COLOCATED


def test_an_instance_keeps_a_router() -> None:
    bench = Bench()
    for wrong in ((), ("127.0.0.1",), ("127.0.0.1:1", "")):
        with pytest.raises(ConfigError):
            bench.service.set_routers(wrong)
    assert bench.routers == []
    bench.service.set_routers(("127.0.0.1:1",))
    assert bench.routers == ["127.0.0.1:1"]

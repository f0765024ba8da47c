"""Who may still have an attempt's KV: sessions, leases, acknowledgements, in the order they may come."""

import asyncio
from collections.abc import Awaitable

import pytest

from tandem.core.clock import ManualClock
from tandem.core.errors import DeadlineError, OverloadedError, StaleEpochError
from tandem.core.request import FinishReason, GenerationRequest, SampledToken
from tandem.core.session import Cancel, PrefillEvent, PrefillFinished, RequestFailed, SubmitPrefill
from tandem.core.transfer import Manifest
from tandem.prefill_worker.loop import Hold, LoopCommand, Release, Submit, Tell
from tandem.prefill_worker.service import PrefillService
from tandem.wire.sessions import Outbox
from tandem.worker.attempt_key import Key

REQUEST = GenerationRequest("r", (1, 2, 3), epoch=1)
MANIFEST = Manifest("r", 1, 3, "hash", (7,), "layout", 64, SampledToken(5))


class Bench:
    """A service with one router connected; what it posts to the loop is kept."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.posted: list[LoopCommand] = []
        self.service = PrefillService(self.posted.append, lease_s=10.0, clock=self.clock)
        self.outbox: Outbox[PrefillEvent] = Outbox()
        self.session = self.service.open_session(self.outbox)
        self.key = Key(self.session, 1)

    def submit(self) -> None:
        self.service.handle(self.session, SubmitPrefill(1, REQUEST))

    def hold(self) -> None:
        self.service.deliver([Hold(self.key, MANIFEST)])

    def pull(self, deadline_s: float = 5.0) -> Awaitable[Manifest]:
        return self.service.manifest("r", 1, self.clock.now_s() + deadline_s)

    @property
    def releases(self) -> list[Key]:
        return [command.key for command in self.posted if isinstance(command, Release)]


async def test_a_pull_waits_for_its_prefill_and_is_acknowledged_once() -> None:
    bench = Bench()
    early = asyncio.ensure_future(bench.pull())  # before the attempt is known
    await asyncio.sleep(0)
    bench.submit()
    assert [type(command) for command in bench.posted] == [Submit]
    bench.hold()
    assert await early == MANIFEST
    assert await bench.pull() == MANIFEST
    assert await bench.service.acknowledge("r", 1)
    assert bench.releases == [bench.key]
    assert not await bench.service.acknowledge("r", 1)
    with pytest.raises(StaleEpochError):
        await bench.pull()
    assert bench.releases == [bench.key]


async def test_another_epoch_is_another_attempt() -> None:
    bench = Bench()
    bench.submit()
    bench.hold()
    assert not await bench.service.acknowledge("r", 0)
    with pytest.raises(DeadlineError):
        await bench.service.manifest("r", 2, 0.01)
    assert await bench.service.acknowledge("r", 1)


async def test_after_a_cancel_nothing_is_handed_out_even_if_the_loop_was_faster() -> None:
    bench = Bench()
    bench.submit()
    waiting = asyncio.ensure_future(bench.pull())
    await asyncio.sleep(0)
    bench.service.handle(bench.session, Cancel(1))
    bench.hold()  # was on its way when the cancel came
    with pytest.raises(StaleEpochError):
        await waiting
    assert not await bench.service.acknowledge("r", 1)
    assert bench.releases == [bench.key]


async def test_an_expired_lease_refuses_the_acknowledgement_before_and_after_it_is_swept() -> None:
    bench = Bench()
    bench.submit()
    bench.hold()
    bench.clock.advance(10.0)
    assert not await bench.service.acknowledge("r", 1)
    sweeping = asyncio.create_task(bench.service.expire_leases())
    async with asyncio.timeout(5):
        while not bench.releases:  # noqa: ASYNC110 - the sweep has its own pace
            await asyncio.sleep(0.05)
    sweeping.cancel()
    with pytest.raises(StaleEpochError, match="lease"):
        await bench.pull()
    assert not await bench.service.acknowledge("r", 1)


async def test_a_lost_router_takes_its_attempts_along_in_every_phase() -> None:
    bench = Bench()
    bench.submit()
    bench.hold()
    bench.service.handle(bench.session, SubmitPrefill(2, GenerationRequest("other", (1,))))
    bench.service.close_session(bench.session)
    assert sorted(key.handle for key in bench.releases) == [1, 2]
    assert not await bench.service.acknowledge("r", 1)
    bench.service.deliver([Hold(Key(bench.session, 2), MANIFEST)])
    assert not await bench.service.acknowledge("r", 1)


async def test_whoever_pulls_learns_why_there_is_nothing() -> None:
    bench = Bench()
    bench.submit()
    bench.service.deliver([Tell(bench.key, RequestFailed(1, "overloaded", "full"))])
    with pytest.raises(OverloadedError, match="full"):
        await bench.pull()
    bench.service.handle(bench.session, SubmitPrefill(3, GenerationRequest("short", (1,))))
    finished = PrefillFinished(3, SampledToken(5), None, FinishReason.STOP, 0, 0.0, 0.0)
    bench.service.deliver([Tell(Key(bench.session, 3), finished)])
    with pytest.raises(StaleEpochError, match="complete"):
        await bench.service.manifest("short", 0, bench.clock.now_s() + 5.0)
    assert bench.releases == []


async def test_an_id_may_be_used_again_once_it_is_over_and_not_before() -> None:
    bench = Bench()
    bench.submit()
    other = Outbox[PrefillEvent]()
    other_session = bench.service.open_session(other)
    bench.service.handle(other_session, SubmitPrefill(9, REQUEST))
    other.close()
    assert [event async for event in other.drain()] == [
        RequestFailed(9, "already_exists", "A request with this id is being served already.")
    ]
    bench.service.handle(bench.session, Cancel(1))
    bench.submit()
    bench.hold()
    assert await bench.pull() == MANIFEST

"""Instances that join, fall silent, restart and drain, with sessions that open, break and open again."""

import asyncio

import pytest

from tandem.core.clock import ManualClock
from tandem.core.errors import IncompatiblePeerError, InvalidRequestError
from tandem.core.session import InstanceState, PrefillStarted, Role
from tests.router.fakes import (
    Cluster,
    Player,
    both_prefills,
    collect,
    expected_tokens,
    make_cluster,
    make_request,
    make_status,
    play_whole,
    running_cluster,
    settle,
    until,
)


async def test_instance_is_usable_once_its_session_is_open() -> None:
    cluster = make_cluster()
    cluster.report(make_status("p1", Role.PREFILL))
    assert not cluster.is_usable("p1")
    task = asyncio.create_task(cluster.fleet.run())
    await until(lambda: cluster.is_usable("p1"))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not cluster.fleet.instances
    assert cluster.session("p1").is_closed


async def test_loading_instance_has_no_session_until_it_is_ready() -> None:
    async with running_cluster() as cluster:
        cluster.report(make_status("p1", Role.PREFILL, state=InstanceState.LOADING))
        await settle()
        assert cluster.workers.opened == 0
        cluster.report(make_status("p1", Role.PREFILL))
        await until(lambda: cluster.is_usable("p1"))
        assert cluster.workers.opened == 1


async def test_draining_keeps_its_session_and_is_not_usable() -> None:
    async with running_cluster("p1") as cluster:
        cluster.report(make_status("p1", Role.PREFILL, state=InstanceState.DRAINING))
        await settle()
        assert cluster.instance("p1").is_connected
        assert not cluster.is_usable("p1")


async def test_a_stalled_instance_loses_its_requests_and_is_taken_again() -> None:
    async with running_cluster("p1", "p2", "d1") as cluster:
        request = make_request()
        consumer = asyncio.create_task(collect(cluster.start(request)))
        used, _ = await both_prefills(cluster)
        other, session = {"p1": "p2", "p2": "p1"}[used], cluster.session(used)
        cluster.report(make_status(used, Role.PREFILL, state=InstanceState.STALLED, step_age_s=1.1))
        await play_whole(Player(cluster, other))
        assert await consumer == expected_tokens(request)
        assert session.is_closed, "the instance drops what it has"
        for _ in range(3):  # heartbeats of the same stall
            cluster.report(make_status(used, Role.PREFILL, state=InstanceState.STALLED, step_age_s=5.0))
            await settle()
        assert cluster.workers.opened == 3
        assert [it.status.state for it in cluster.fleet.instances].count(InstanceState.STALLED) == 1
        cluster.report(make_status(used, Role.PREFILL))
        await until(lambda: cluster.is_usable(used))
        assert cluster.workers.opened == 4


async def test_a_stall_while_the_session_opens_leaves_no_session() -> None:
    async with running_cluster() as cluster:
        cluster.workers.refusing.add("p1")
        cluster.report(make_status("p1", Role.PREFILL))
        await settle()
        cluster.report(make_status("p1", Role.PREFILL, state=InstanceState.STALLED))
        cluster.workers.refusing.clear()
        await asyncio.sleep(0.2)
        assert cluster.workers.opened == 0
        cluster.report(make_status("p1", Role.PREFILL))
        await until(lambda: cluster.is_usable("p1"))


async def pass_time(cluster: Cluster, clock: ManualClock, seconds: float, *reporting: str) -> None:
    """While the fleet has its rounds; instances of these ids report."""
    for _ in range(round(seconds / 0.25)):
        clock.advance(0.25)
        for instance_id in reporting:
            cluster.report(cluster.instance(instance_id).status)
        cluster.fleet._changed.set()  # without waiting for the round's time
        await until(lambda: cluster.fleet._round_at_s == clock.now_s())


async def test_silence_removes_and_a_heartbeat_brings_back() -> None:
    clock = ManualClock()
    async with running_cluster("p1", "d1", heartbeat_timeout_s=3.0, clock=clock) as cluster:
        await pass_time(cluster, clock, 2.5, "d1")
        cluster.report(make_status("p1", Role.PREFILL))
        await pass_time(cluster, clock, 2.5, "d1")
        assert cluster.is_usable("p1")
        session = cluster.session("p1")
        await pass_time(cluster, clock, 1.0, "d1")
        await until(lambda: session.is_closed)
        assert [it.instance_id for it in cluster.fleet.instances] == ["d1"]
        cluster.report(make_status("p1", Role.PREFILL))
        await until(lambda: cluster.is_usable("p1"))
        assert cluster.workers.opened == 3


async def test_an_instance_whose_tokens_come_is_not_silent() -> None:
    clock = ManualClock()
    async with running_cluster("p1", "d1", heartbeat_timeout_s=3.0, clock=clock) as cluster:
        for _ in range(5):
            cluster.session("p1").push(PrefillStarted(99, 0))  # of an attempt that was cancelled
            await pass_time(cluster, clock, 1.0, "d1")
        assert cluster.is_usable("p1")


async def test_the_silence_of_all_is_the_routers_own_at_first() -> None:
    """Without a core, or cut off, it hears nobody. There is no instance to which requests could go instead."""
    clock = ManualClock()
    async with running_cluster("p1", "d1", heartbeat_timeout_s=3.0, clock=clock) as cluster:
        await pass_time(cluster, clock, 5.0)
        assert cluster.is_usable("p1")
        cluster.report(make_status("p1", Role.PREFILL))  # the first of those that have waited
        await pass_time(cluster, clock, 1.0)
        cluster.report(make_status("d1", Role.DECODE))
        assert cluster.is_usable("d1")
        await pass_time(cluster, clock, 9.0)
        assert not cluster.fleet.instances


async def test_a_router_that_was_stopped_condemns_nobody() -> None:
    """The clock must not be read before the heartbeats that wait."""
    clock = ManualClock()
    async with running_cluster("p1", "d1", heartbeat_timeout_s=3.0, clock=clock) as cluster:
        running = cluster.start(make_request())
        await asyncio.sleep(0.3)
        for stopped_s in (2.9, 30.0):
            clock.advance(stopped_s)
            await asyncio.sleep(0.6)
            assert cluster.is_usable("p1")
            assert cluster.is_usable("d1")
        assert cluster.workers.opened == 2
        assert running.timeline().num_attempts == 1
        await running.aclose()


async def test_a_router_that_is_always_late_finds_who_is_silent() -> None:
    clock = ManualClock()
    async with running_cluster("p1", "d1", heartbeat_timeout_s=3.0, clock=clock) as cluster:
        rounds = 0
        while cluster.is_usable("p1") and rounds < 20:
            clock.advance(0.7)
            cluster.report(make_status("d1", Role.DECODE))
            cluster.fleet._changed.set()
            await until(lambda: cluster.fleet._round_at_s == clock.now_s())
            rounds += 1
        assert 3.0 / 0.5 <= rounds <= 3.0 / 0.5 + 2
        assert cluster.is_usable("d1")


async def test_a_malformed_heartbeat_drops_that_instance_only() -> None:
    async with running_cluster("p1", "d1", "d2") as cluster:
        for changes in ({"block_size": 0}, {"uncomputed_tokens": -1}):
            with pytest.raises(InvalidRequestError, match="values that cannot be"):
                cluster.report(make_status("d1", Role.DECODE, **changes))
            assert {instance.instance_id for instance in cluster.fleet.instances} == {"p1", "d2"}
        cluster.report(make_status("d1", Role.DECODE))
        await until(lambda: cluster.is_usable("d1"))


async def test_a_malformed_event_drops_that_session_only(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster("p1", "d1") as cluster:
        request = make_request()
        consumer = asyncio.create_task(collect(cluster.start(request)))
        player = Player(cluster, "p1")
        await player.start_prefill()
        player.prefill.push(None)  # type: ignore[arg-type]
        await until(lambda: cluster.session("p1") is not player.prefill and cluster.session("p1").commands)
        assert "session with p1 is dropped" in caplog.text
        player.decode.commands.clear()
        await play_whole(Player(cluster, "p1"))
        assert await consumer == expected_tokens(request)


async def test_an_instance_changes_its_role_in_place() -> None:
    async with running_cluster("p1", "p2", "d1") as cluster:
        request = make_request()
        consumer = asyncio.create_task(collect(cluster.start(request)))
        used, _ = await both_prefills(cluster)
        player = Player(cluster, used)
        await player.start_prefill()
        cluster.report(make_status(used, Role.COLOCATED))
        assert cluster.is_usable(used)
        await player.finish_prefill()
        await player.commit()
        await player.generate(4, last=True)
        assert await consumer == expected_tokens(request)
        assert cluster.workers.opened == 3


async def test_restarted_worker_at_the_same_address_takes_the_place_of_the_old_one() -> None:
    async with running_cluster("p1") as cluster:
        old = cluster.instance("p1")
        session = cluster.session("p1")
        cluster.report(make_status("p-new", Role.PREFILL, address=old.status.address))
        assert [it.instance_id for it in cluster.fleet.instances] == ["p-new"]
        assert not old.is_connected
        await until(lambda: cluster.is_usable("p-new"))
        await until(lambda: session.is_closed)


async def test_same_instance_at_a_new_address_is_reached_there() -> None:
    async with running_cluster("p1") as cluster:
        cluster.report(make_status("p1", Role.PREFILL, address="127.0.0.1:9"))
        assert [it.status.address for it in cluster.fleet.instances] == ["127.0.0.1:9"]
        await until(lambda: cluster.is_usable("p1"))
        assert cluster.workers.opened == 2


async def test_broken_session_is_opened_again_while_heartbeats_continue() -> None:
    async with running_cluster("p1") as cluster:
        first = cluster.session("p1")
        cluster.workers.refusing.add("p1")
        first.cut()
        await until(lambda: not cluster.instance("p1").is_connected)
        assert not cluster.is_usable("p1")
        cluster.workers.refusing.clear()
        await until(lambda: cluster.is_usable("p1"))
        assert cluster.session("p1") is not first


async def test_other_model_is_refused() -> None:
    async with running_cluster() as cluster:
        with pytest.raises(IncompatiblePeerError, match="serves 'tiny', not 'other'"):
            cluster.report(make_status("p1", Role.PREFILL, model="other"))
        assert not cluster.fleet.instances


async def test_capacity_is_that_of_the_best_pair() -> None:
    async with running_cluster() as cluster:
        for instance_id, role, changes in (
            ("p1", Role.PREFILL, {"max_model_len": 100}),
            ("p2", Role.PREFILL, {"max_model_len": 900, "fingerprint": "lonely"}),
            ("d1", Role.DECODE, {"max_model_len": 80}),
            ("d2", Role.DECODE, {"max_model_len": 2000, "block_size": 1}),  # 64 blocks: memory for 64 tokens
        ):
            cluster.report(make_status(instance_id, role, **changes))
        await until(lambda: all(it.is_connected for it in cluster.fleet.instances))
        assert cluster.dispatcher.max_model_len == 80


async def test_queue_of_other_routers_counts() -> None:
    async with running_cluster("p1") as cluster:
        instance = cluster.instance("p1")
        cluster.report(make_status("p1", Role.PREFILL, uncomputed_tokens=500))
        assert (instance.uncomputed_tokens, instance.queued_tokens) == (0, 500)


async def test_longest_pair_follows_who_is_usable_and_what_they_hold() -> None:
    async with running_cluster("p1", "d1", "d2") as cluster:
        assert cluster.dispatcher.max_model_len == 256
        cluster.report(make_status("p1", Role.PREFILL, max_model_len=200))
        assert cluster.dispatcher.max_model_len == 200
        cluster.report(make_status("d1", Role.DECODE, max_model_len=100))
        assert cluster.dispatcher.max_model_len == 200
        cluster.report(make_status("d2", Role.DECODE, fingerprint="g"))
        assert cluster.dispatcher.max_model_len == 100
        cluster.report(make_status("d1", Role.DECODE, state=InstanceState.DRAINING))
        assert not cluster.dispatcher.is_serving


async def test_last_words_of_a_replaced_instance_are_not_taken_for_its_successors() -> None:
    async with running_cluster("p1", "d1") as cluster:
        old = cluster.fleet._registered["p1"]
        session = old.session
        cluster.report(make_status("p1", Role.PREFILL, address="127.0.0.1:9"))
        await until(lambda: cluster.instance("p1").is_connected)
        cluster.fleet._disconnect(old, session)
        assert cluster.dispatcher.is_serving


async def test_no_instance_is_lost_when_the_router_goes(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster("p1", "d1") as cluster:
        cluster.report(make_status("p1", Role.PREFILL, address="127.0.0.1:9"))
    assert caplog.text.count("is gone") == 1, "its own end is no loss of instances"

"""Instances that join, fall silent, restart and drain, with sessions that open, break and open again."""

import asyncio

import pytest

from tandem.core.clock import ManualClock
from tandem.core.errors import IncompatiblePeerError, UnavailableError
from tandem.core.session import InstanceState, Role
from tandem.router.fleet import Fleet
from tests.router.fakes import MODEL, FakeWorkers, make_status, running_cluster, settle, until


async def test_instance_is_usable_once_its_session_is_open() -> None:
    workers = FakeWorkers()
    fleet = Fleet(model=MODEL, opener=workers, heartbeat_timeout_s=60.0, clock=ManualClock())
    fleet.heartbeat(make_status("p1", Role.PREFILL))
    assert not fleet.usable(Role.PREFILL)
    task = asyncio.create_task(fleet.run())
    await until(lambda: fleet.usable(Role.PREFILL))
    assert not fleet.usable(Role.DECODE)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not fleet.instances
    assert workers.sessions["p1"].is_closed


async def test_loading_instance_has_no_session_until_it_is_ready() -> None:
    async with running_cluster() as cluster:
        cluster.fleet.heartbeat(make_status("p1", Role.PREFILL, state=InstanceState.LOADING))
        await settle()
        assert cluster.workers.opened == 0
        cluster.fleet.heartbeat(make_status("p1", Role.PREFILL))
        await until(lambda: cluster.fleet.usable(Role.PREFILL))
        assert cluster.workers.opened == 1


async def test_draining_keeps_its_session_and_is_not_usable() -> None:
    async with running_cluster("p1") as cluster:
        cluster.fleet.heartbeat(make_status("p1", Role.PREFILL, state=InstanceState.DRAINING))
        await settle()
        assert cluster.instance("p1").connected
        assert not cluster.fleet.usable(Role.PREFILL)


async def test_silence_removes_and_a_heartbeat_brings_back() -> None:
    clock = ManualClock()
    workers = FakeWorkers()
    fleet = Fleet(model=MODEL, opener=workers, heartbeat_timeout_s=0.2, clock=clock)
    task = asyncio.create_task(fleet.run())
    fleet.heartbeat(make_status("p1", Role.PREFILL))
    await until(lambda: fleet.usable(Role.PREFILL))
    clock.advance(0.15)
    fleet.heartbeat(make_status("p1", Role.PREFILL))
    clock.advance(0.15)
    await asyncio.sleep(0.05)
    assert fleet.usable(Role.PREFILL)
    clock.advance(0.15)
    await until(lambda: not fleet.instances)
    await until(lambda: workers.sessions["p1"].is_closed)
    fleet.heartbeat(make_status("p1", Role.PREFILL))
    await until(lambda: fleet.usable(Role.PREFILL))
    assert workers.opened == 2
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_restarted_worker_at_the_same_address_takes_the_place_of_the_old_one() -> None:
    async with running_cluster("p1") as cluster:
        old = cluster.instance("p1")
        session = cluster.session("p1")
        cluster.fleet.heartbeat(make_status("p-new", Role.PREFILL, address=old.status.address))
        assert [it.instance_id for it in cluster.fleet.instances] == ["p-new"]
        assert not old.connected
        await until(lambda: cluster.fleet.usable(Role.PREFILL))
        assert session.is_closed


async def test_same_instance_at_a_new_address_is_reached_there() -> None:
    async with running_cluster("p1") as cluster:
        cluster.fleet.heartbeat(make_status("p1", Role.PREFILL, address="127.0.0.1:9"))
        assert [it.status.address for it in cluster.fleet.instances] == ["127.0.0.1:9"]
        await until(lambda: cluster.fleet.usable(Role.PREFILL))
        assert cluster.workers.opened == 2


async def test_broken_session_is_opened_again_while_heartbeats_continue() -> None:
    async with running_cluster("p1") as cluster:
        first = cluster.session("p1")
        cluster.workers.refusing.add("p1")
        first.cut()
        await until(lambda: not cluster.instance("p1").connected)
        assert not cluster.fleet.usable(Role.PREFILL)
        cluster.workers.refusing.clear()
        await until(lambda: cluster.fleet.usable(Role.PREFILL))
        assert cluster.session("p1") is not first


async def test_other_model_is_refused() -> None:
    async with running_cluster() as cluster:
        with pytest.raises(IncompatiblePeerError, match="serves 'tiny', not 'other'"):
            cluster.fleet.heartbeat(make_status("p1", Role.PREFILL, model="other"))
        assert not cluster.fleet.instances


async def test_capacity_is_that_of_the_best_pair() -> None:
    async with running_cluster() as cluster:
        for instance_id, role, changes in (
            ("p1", Role.PREFILL, {"max_model_len": 100}),
            ("p2", Role.PREFILL, {"max_model_len": 900, "fingerprint": "lonely"}),
            ("d1", Role.DECODE, {"max_model_len": 80}),
            ("d2", Role.DECODE, {"max_model_len": 2000, "block_size": 1}),  # 64 blocks: memory for 64 tokens
        ):
            cluster.fleet.heartbeat(make_status(instance_id, role, **changes))
        await until(lambda: all(it.connected for it in cluster.fleet.instances))
        assert cluster.fleet.pair_capacity_tokens() == 80


async def test_queue_of_other_routers_counts() -> None:
    async with running_cluster("p1") as cluster:
        instance = cluster.instance("p1")
        cluster.fleet.heartbeat(make_status("p1", Role.PREFILL, waiting_tokens=500))
        assert (instance.waiting_tokens, instance.queued_tokens) == (0, 500)


async def test_longest_pair_follows_who_is_usable_and_what_they_hold() -> None:
    async with running_cluster("p1", "d1", "d2") as cluster:
        fleet = cluster.fleet
        assert fleet.pair_capacity_tokens() == 256
        fleet.heartbeat(make_status("p1", Role.PREFILL, max_model_len=200))
        assert fleet.pair_capacity_tokens() == 200
        fleet.heartbeat(make_status("d1", Role.DECODE, max_model_len=100))
        assert fleet.pair_capacity_tokens() == 200
        fleet.heartbeat(make_status("d2", Role.DECODE, fingerprint="g"))
        assert fleet.pair_capacity_tokens() == 100
        fleet.heartbeat(make_status("d1", Role.DECODE, state=InstanceState.DRAINING))
        assert not fleet.has_pair()


async def test_last_words_of_a_replaced_instance_are_not_taken_for_its_successors() -> None:
    async with running_cluster("p1", "d1") as cluster:
        old = cluster.instance("p1")
        cluster.fleet.heartbeat(make_status("p1", Role.PREFILL, address="127.0.0.1:9"))
        await until(lambda: cluster.instance("p1").connected)
        old.lose(UnavailableError("gone"))
        assert cluster.fleet.has_pair()


async def test_watchers_hear_of_all_there_are_and_of_every_change() -> None:
    async with running_cluster("p1") as cluster:
        heard: list[str] = []
        cluster.fleet.watch(lambda instance: heard.append(instance.instance_id))
        assert heard == ["p1"]
        await cluster.join("d1")
        assert heard[1:] == ["d1"]
        cluster.fleet.heartbeat(make_status("p1", Role.PREFILL, waiting_tokens=5))
        assert heard[2:] == ["p1"]
        cluster.fleet.heartbeat(make_status("p2", Role.PREFILL, address=cluster.instance("p1").status.address))
        assert "p1" in heard[3:]
        assert cluster.fleet.get("p1") is None

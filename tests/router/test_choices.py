"""How live load becomes the views that `scheduling.routing` compares."""

import pytest

from tandem.core.errors import ContextLengthError
from tandem.core.request import SamplingParams
from tandem.core.session import BlockCounts, Cancel, InstanceState, Role, SubmitPrefill
from tandem.router.choices import LoadChooser
from tests.router.fakes import Cluster, Player, make_request, make_status, running_cluster, until

NOTHING: frozenset[str] = frozenset()


def report(cluster: Cluster, instance_id: str, role: Role, **changes: object) -> None:
    cluster.fleet.heartbeat(make_status(instance_id, role, **changes))


async def test_own_queue_counts_before_the_next_heartbeat() -> None:
    async with running_cluster("p1", "p2", "d1") as cluster:
        chooser = LoadChooser(cluster.fleet)
        long = cluster.start(make_request("long", (9,) * 200))
        busy = next(it for it in cluster.fleet.instances if it.queued_tokens)
        for i in range(3):
            assert chooser.choose_prefill(make_request(prompt=(i, 1)), NOTHING).instance is not busy
        await long.aclose()
        assert busy.queued_tokens == 0


async def test_other_routers_queue_counts() -> None:
    async with running_cluster("p1", "p2", "d1") as cluster:
        chooser = LoadChooser(cluster.fleet)
        report(cluster, "p1", Role.PREFILL, waiting_tokens=300)
        for i in range(3):
            assert chooser.choose_prefill(make_request(prompt=(i, 1)), NOTHING).instance.instance_id == "p2"


async def test_avoided_instances_are_a_last_resort() -> None:
    async with running_cluster("p1", "p2", "d1", "d2") as cluster:
        chooser = LoadChooser(cluster.fleet)
        request = make_request()
        for i in range(4):
            assert chooser.choose_prefill(request, frozenset({"p1"})).instance.instance_id == "p2"
            chosen = chooser.choose_decode(request, cluster.instance("p2"), frozenset({"d2"}))
            assert chosen.instance.instance_id == "d1", i
        assert chooser.choose_prefill(request, frozenset({"p1", "p2"})).instance.instance_id in ("p1", "p2")


async def test_decode_goes_where_memory_is() -> None:
    async with running_cluster("p1", "d1", "d2") as cluster:
        chooser = LoadChooser(cluster.fleet)
        report(cluster, "d1", Role.DECODE, blocks=BlockCounts(total=64, free=4, running=60, cached=0, leased=0))
        for _ in range(3):
            chosen = chooser.choose_decode(make_request(), cluster.instance("p1"), NOTHING)
            assert chosen.instance.instance_id == "d2"
            assert "worse by" in chosen.choice.explain()


async def test_open_requests_count_on_decode_before_the_next_heartbeat() -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request("big", (5,) * 100, sampling=SamplingParams(max_tokens=100)))
        player = Player(cluster, "p1")
        await player.start_prefill()
        assert cluster.instance("d1").held_tokens == 200
        await cluster.join("d2")
        for _ in range(3):
            chosen = LoadChooser(cluster.fleet).choose_decode(make_request(), cluster.instance("p1"), NOTHING)
            assert chosen.instance.instance_id == "d2"
        await running.aclose()


async def test_prefix_of_an_instance_that_is_gone_is_forgotten() -> None:
    async with running_cluster("p1", "d1") as cluster:
        chooser = LoadChooser(cluster.fleet)
        request = make_request(prompt=tuple(range(64)))
        chooser.choose_prefill(request, NOTHING)
        again = chooser.choose_prefill(request, NOTHING)
        assert ("cached", -63) in again.choice.candidates[0].terms
        address = cluster.instance("p1").status.address
        report(cluster, "p2", Role.PREFILL, address=address)
        await until(lambda: cluster.fleet.usable(Role.PREFILL))
        fresh = chooser.choose_prefill(request, NOTHING)
        assert ("cached", 0) in fresh.choice.candidates[0].terms


async def test_prefix_is_of_one_salt() -> None:
    async with running_cluster("p1", "d1") as cluster:
        chooser = LoadChooser(cluster.fleet)
        prompt = tuple(range(64))
        chooser.choose_prefill(make_request(prompt=prompt, cache_salt="a"), NOTHING)
        other = chooser.choose_prefill(make_request(prompt=prompt, cache_salt="b"), NOTHING)
        assert ("cached", 0) in other.choice.candidates[0].terms


async def test_prompt_too_long_for_the_pair() -> None:
    async with running_cluster("p1", "d1") as cluster:
        with pytest.raises(ContextLengthError, match="at most 256"):
            LoadChooser(cluster.fleet).choose_prefill(make_request(prompt=(1,) * 300), NOTHING)


async def test_cached_part_of_a_prompt_is_no_queue() -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request(prompt=(1,) * 100))
        instance = cluster.instance("p1")
        submit = cluster.session("p1").take(SubmitPrefill)
        assert instance.queued_tokens == 100
        instance.computed(submit.handle, 64)
        assert instance.queued_tokens == 36
        instance.computed(submit.handle, 100)
        assert instance.queued_tokens == 0
        await running.aclose()
        assert cluster.session("p1").take(Cancel).handle == submit.handle


async def test_an_instance_that_came_back_in_the_other_role_is_chosen_for_that_only() -> None:
    async with running_cluster("p1", "p2", "d1") as cluster:
        chooser = LoadChooser(cluster.fleet)
        request = make_request()
        assert {chooser.choose_prefill(request, NOTHING).instance.instance_id for _ in range(2)} == {"p1", "p2"}
        address = cluster.instance("p2").status.address
        report(cluster, "p2", Role.DECODE, address=address)
        await until(lambda: cluster.instance("p2").connected)
        for i in range(4):
            assert chooser.choose_prefill(make_request(prompt=(i,)), NOTHING).instance.instance_id == "p1"
        decodes = {chooser.choose_decode(request, cluster.instance("p1"), NOTHING).instance.instance_id}
        decodes.add(chooser.choose_decode(request, cluster.instance("p1"), NOTHING).instance.instance_id)
        assert decodes == {"d1", "p2"}


async def test_draining_and_lost_instances_are_not_chosen() -> None:
    async with running_cluster("p1", "p2", "d1", "d2") as cluster:
        chooser = LoadChooser(cluster.fleet)
        report(cluster, "p1", Role.PREFILL, state=InstanceState.DRAINING)
        cluster.workers.refusing.add("d1")
        cluster.session("d1").cut()
        await until(lambda: not cluster.instance("d1").connected)
        for i in range(3):
            prefill = chooser.choose_prefill(make_request(prompt=(i, 1)), NOTHING).instance
            assert prefill.instance_id == "p2"
            assert chooser.choose_decode(make_request(), prefill, NOTHING).instance.instance_id == "d2"
        report(cluster, "p1", Role.PREFILL)
        assert {chooser.choose_prefill(make_request(), NOTHING).instance.instance_id for _ in range(2)} == {"p1", "p2"}


async def test_instances_of_other_block_sizes_keep_their_own_cache() -> None:
    async with running_cluster("p1", "d1") as cluster:
        chooser = LoadChooser(cluster.fleet)
        request = make_request(prompt=tuple(range(64)))
        chooser.choose_prefill(request, NOTHING)
        report(cluster, "p2", Role.PREFILL, block_size=32)
        await until(lambda: cluster.instance("p2").connected)
        choice = chooser.choose_prefill(make_request(prompt=tuple(range(50))), NOTHING).choice
        assert choice.instance_id == "p1"
        assert ("cached", -48) in choice.candidates[0].terms
        assert ("cached", 0) in choice.candidates[1].terms

"""One request's life, with workers whose every event the test sends."""

import asyncio
import time
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from tandem.core.errors import (
    ContextLengthError,
    DuplicateRequestError,
    OverloadedError,
    UnavailableError,
)
from tandem.core.request import FinishReason, SamplingParams
from tandem.core.session import (
    Cancel,
    InstanceState,
    NewTokens,
    PrefillStarted,
    Role,
    Submit,
    TokenFrame,
)
from tandem.core.timeline import PARTS, Stage
from tandem.scheduling.prefix_index import block_hashes, extend_block_hashes
from tests.router.fakes import (
    ROUTING,
    Player,
    both_prefills,
    collect,
    expected_tokens,
    finished_event,
    make_request,
    make_status,
    next_tokens,
    play_whole,
    running_cluster,
    settle,
    until,
)

# --- the usual way ---------------------------------------------------------------------------------------------------


async def test_whole_transport() -> None:
    async with running_cluster("p1", "d1") as cluster:
        request = make_request()
        running = cluster.start(request)
        player = Player(cluster, "p1")
        consumer = asyncio.create_task(collect(running))
        await play_whole(player)
        assert await consumer == expected_tokens(request)
        assert running.finish_reason is FinishReason.LENGTH
        source = player.open.kv
        assert (source.instance_id, source.address) == ("p1", cluster.instance("p1").status.address)
        assert player.open.request == player.submit.request
        assert not player.prefill.commands, "what has finished is not cancelled"
        assert not player.decode.commands
        assert [record.outcome for record in cluster.records] == ["length"]


async def test_first_token_does_not_wait_for_the_transfer() -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request())
        player = Player(cluster, "p1")
        await player.start_prefill()
        await player.finish_prefill()
        async with asyncio.timeout(10):
            assert len(await anext(running)) == 1
        await running.aclose()


async def test_decode_is_chosen_only_when_prefill_starts() -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request())
        player = Player(cluster, "p1")
        await player.take_submit()
        await settle()
        assert not player.decode.commands
        await running.aclose()


async def test_one_token_answer_needs_no_decode() -> None:
    async with running_cluster("p1", "d1") as cluster:
        request = make_request(sampling=SamplingParams(max_tokens=1))
        running = cluster.start(request)
        player = Player(cluster, "p1")
        await player.take_submit()
        player.prefill.push(PrefillStarted(player.submit.handle, 0))
        await player.finish_prefill()
        assert await collect(running) == expected_tokens(request)
        assert running.finish_reason is FinishReason.LENGTH
        assert not player.decode.sent


async def test_prefill_that_ends_the_answer_cancels_decode() -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request())
        player = Player(cluster, "p1")
        await player.start_prefill()
        event = replace(finished_event(player.submit.handle, player.submit.request), finish_reason=FinishReason.STOP)
        player.prefill.push(event)
        await settle()
        assert len(await collect(running)) == 1
        assert running.finish_reason is FinishReason.STOP
        assert player.decode.take(Cancel) == Cancel(player.open.handle)


async def test_tokens_of_decode_that_overtake_the_first_are_held() -> None:
    async with running_cluster("p1", "d1") as cluster:
        request = make_request()
        running = cluster.start(request)
        player = Player(cluster, "p1")
        await player.start_prefill()
        await player.commit()
        await player.generate(2)
        await player.generate(2, skip=3, last=True)
        consumer = asyncio.create_task(collect(running))
        await settle()
        assert not consumer.done()
        await player.finish_prefill()
        assert await consumer == expected_tokens(request)
        assert not player.prefill.commands, "its KV has been fetched: there is nothing to cancel"
        assert sum(running.timeline().parts().values()) == pytest.approx(running.timeline().total_s)


async def test_slow_consumer_gets_what_has_piled_up_at_once() -> None:
    async with running_cluster("p1", "d1") as cluster:
        request = make_request()
        running = cluster.start(request)
        await play_whole(Player(cluster, "p1"))
        batch = await anext(running)
        assert [token.token_id for token in batch] == expected_tokens(request)
        with pytest.raises(StopAsyncIteration):
            await anext(running)


async def test_many_requests_share_frames() -> None:
    async with running_cluster("p1", "d1") as cluster:
        requests = [make_request(f"r{i}", (i, i + 1)) for i in range(8)]
        consumers = [asyncio.create_task(collect(cluster.start(request))) for request in requests]
        players = [Player(cluster, "p1") for _ in requests]
        for player in players:
            await player.start_prefill()
            await player.finish_prefill()
            await player.commit()
        for skip in range(1, 5):
            last = FinishReason.LENGTH if skip == 4 else None
            items = tuple(NewTokens(p.open.handle, next_tokens(p.open.request, 1, skip), last) for p in players)
            cluster.session("d1").push(TokenFrame(items))
        assert await asyncio.gather(*consumers) == [expected_tokens(request) for request in requests]


# --- timeline --------------------------------------------------------------------------------------------------------


async def test_parts_sum_to_what_the_consumer_saw() -> None:
    async with running_cluster("p1", "d1") as cluster:
        begin_s = time.monotonic()
        running = cluster.dispatcher.start(make_request(), begin_s)
        consumer = asyncio.create_task(collect(running))
        player = Player(cluster, "p1")
        await player.start_prefill()
        await asyncio.sleep(0.01)
        await play_rest(player)
        await consumer
        timeline = running.timeline()
        assert sum(timeline.parts().values()) == pytest.approx(timeline.total_s)
        assert set(timeline.stamps) == set(Stage)
        ordered = [timeline.stamps[stage] for stage, _ in PARTS]
        assert ordered == sorted(ordered)
        assert timeline.stamps[Stage.FIRST_TOKEN] - timeline.stamps[Stage.PREFILL_STARTED] == pytest.approx(0.001)
        assert (timeline.num_prompt_tokens, timeline.num_output_tokens) == (3, 5)
        assert timeline.num_cached_tokens == 1


async def play_rest(player: Player) -> None:
    await player.finish_prefill()
    await player.commit()
    await player.generate(4, last=True)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("present", "missing"), [((), ""), (("p1",), "decode "), (("d1",), "prefill ")])
async def test_without_a_pair_the_missing_role_is_named(present: tuple[str, ...], missing: str) -> None:
    async with running_cluster(*present) as cluster:
        with pytest.raises(UnavailableError, match=f"no {missing}worker is ready"):
            cluster.start(make_request())
        with pytest.raises(UnavailableError):
            _ = cluster.dispatcher.max_model_len


async def test_prompt_that_no_pair_can_hold() -> None:
    async with running_cluster("p1", "d1") as cluster:
        assert cluster.dispatcher.max_model_len == 256
        with pytest.raises(ContextLengthError, match="256"):
            cluster.start(make_request(prompt=(1,) * 256))
        running = cluster.start(make_request(prompt=(1,) * 255))
        await running.aclose()


async def test_layouts_that_differ_are_no_pair() -> None:
    async with running_cluster("p1") as cluster:
        cluster.report(make_status("d1", Role.DECODE, fingerprint="other"))
        await until(lambda: cluster.instance("d1").is_connected)
        with pytest.raises(UnavailableError, match="whose KV"):
            cluster.start(make_request())
        assert not cluster.dispatcher.is_serving


async def test_running_id_is_refused_and_a_finished_one_is_not() -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request("same"))
        with pytest.raises(DuplicateRequestError):
            cluster.start(make_request("same"))
        await running.aclose()
        again = cluster.start(make_request("same"))
        await again.aclose()


async def test_full_queue_refuses() -> None:
    async with running_cluster("p1", "d1", routing=replace(ROUTING, max_queue=2)) as cluster:
        first = cluster.start(make_request("a"))
        second = cluster.start(make_request("b"))
        with pytest.raises(OverloadedError):
            cluster.start(make_request("c"))
        assert (cluster.dispatcher.queued_requests, cluster.dispatcher.running_requests) == (2, 0)
        await first.aclose()
        third = cluster.start(make_request("c"))
        await asyncio.gather(second.aclose(), third.aclose())


# --- drain -----------------------------------------------------------------------------------------------------------


async def test_draining_instance_finishes_and_takes_nothing_new() -> None:
    async with running_cluster("p1", "p2", "d1") as cluster:
        request = make_request()
        consumer = asyncio.create_task(collect(cluster.start(request)))
        used, other = await both_prefills(cluster)
        cluster.report(make_status(used, Role.PREFILL, state=InstanceState.DRAINING))
        player = Player(cluster, used)
        for i in range(4):
            running = cluster.start(make_request(f"new{i}"))
            assert cluster.session(other).take(Submit).request.request_id == f"new{i}"
            await running.aclose()
            cluster.session(other).take(Cancel)
        await play_whole(player)
        assert await consumer == expected_tokens(request)


async def test_router_that_drains_refuses_and_lets_run() -> None:
    async with running_cluster("p1", "d1") as cluster:
        request = make_request()
        consumer = asyncio.create_task(collect(cluster.start(request)))
        cluster.dispatcher.refuse_new()
        with pytest.raises(UnavailableError, match="shutting down"):
            cluster.start(make_request("late"))
        idle = asyncio.create_task(cluster.dispatcher.wait_until_idle())
        await settle()
        assert not idle.done()
        await play_whole(Player(cluster, "p1"))
        await idle
        assert await consumer == expected_tokens(request)


async def test_abort_all_ends_each_request_once() -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = [cluster.start(make_request(f"r{i}")) for i in range(3)]
        cluster.dispatcher.abort_all()
        for each in running:
            with pytest.raises(UnavailableError):
                await collect(each)
        await cluster.dispatcher.wait_until_idle()
        commands = cluster.session("p1").sent
        assert sorted(c.handle for c in commands if isinstance(c, Cancel)) == sorted(
            c.handle for c in commands if isinstance(c, Submit)
        )


async def test_prompt_goes_where_its_prefix_is() -> None:
    async with running_cluster("p1", "p2", "d1") as cluster:
        prompt = tuple(range(64))
        used = set()
        for i in range(4):
            running = cluster.start(make_request(f"r{i}", prompt))
            owner = next(it for it in ("p1", "p2") if cluster.session(it).commands)
            used.add(owner)
            await running.aclose()
            cluster.session(owner).commands.clear()
        assert len(used) == 1


async def test_blocks_are_named_once_for_all_choices_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces: names of a long prompt would hold up the event loop."""
    named: list[int] = []

    def count_blocks(hashes: list[bytes], *args: Any) -> None:
        before = len(hashes)
        extend_block_hashes(hashes, *args)
        named.append(len(hashes) - before)

    monkeypatch.setattr("tandem.router.dispatch.extend_block_hashes", count_blocks)
    monkeypatch.setattr("tandem.router.dispatch.block_hashes", None)  # it would fail
    async with running_cluster("p1", "p2", "d1") as cluster:
        (block_size,) = {instance.status.block_size for instance in cluster.dispatcher.machine.instances.values()}
        prompt = tuple(range(5000 * block_size))
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        others = asyncio.create_task(count_turns())
        names = await cluster.dispatcher.name_blocks(prompt, "salt")
        others.cancel()
        assert turns >= 3
        assert sum(named) == 5000
        assert max(named) <= 2048
        assert names(block_size) == block_hashes(prompt, block_size, "salt")
        for position in range(4):
            cluster.dispatcher.start(make_request(f"r{position}", prompt[:64]), time.monotonic(), names)
        assert sum(named) == 5000
    newcomer = block_hashes(prompt, block_size + 1, "salt")
    monkeypatch.undo()
    assert names(block_size + 1) == newcomer, "an instance that came later has other blocks"


async def test_load_spreads_over_both_roles() -> None:
    async with running_cluster("p1", "p2", "d1", "d2") as cluster:
        running = [cluster.start(make_request(f"r{i}", (i, i, i))) for i in range(6)]
        for instance_id in ("p1", "p2"):
            session = cluster.session(instance_id)
            assert len(session.commands) == 3
            session.push(*(PrefillStarted(command.handle, 0) for command in session.commands))
        await settle()
        for instance_id in ("d1", "d2"):
            assert sum(isinstance(command, Submit) for command in cluster.session(instance_id).commands) == 3
        for each in running:
            await each.aclose()


async def test_colocated_instance_serves_both_phases() -> None:
    async with running_cluster("c1") as cluster:
        request = make_request()
        running = cluster.start(request)
        session = cluster.session("c1")
        submit = session.take(Submit)
        assert (submit.kv, submit.hand_over) == (None, False)
        consumer = asyncio.create_task(collect(running))
        session.push(
            PrefillStarted(submit.handle, 0),
            finished_event(submit.handle, submit.request),
            TokenFrame((NewTokens(submit.handle, next_tokens(submit.request, 4, 1), FinishReason.LENGTH),)),
        )
        assert await consumer == expected_tokens(request)
        assert not session.commands
        assert sum(running.timeline().parts().values()) == pytest.approx(running.timeline().total_s)
        assert "attempt 1, both phases on c1" in cluster.log.explain(request.request_id)


async def test_request_goes_on_where_the_other_form_is() -> None:
    async with running_cluster("c1") as cluster:
        request = make_request()
        consumer = asyncio.create_task(collect(cluster.start(request)))
        session = cluster.session("c1")
        submit = session.take(Submit)
        session.push(
            finished_event(submit.handle, submit.request),
            TokenFrame((NewTokens(submit.handle, next_tokens(submit.request, 1, 1)),)),
        )
        await cluster.join("p1", "d1")
        session.cut()
        player = Player(cluster, "p1")
        await player.start_prefill()
        assert player.submit.request.num_output_tokens == 2
        await player.finish_prefill()
        await player.commit()
        await player.generate(2, last=True)
        assert await consumer == expected_tokens(request)
        assert [len(record.attempts) for record in cluster.records] == [2]


async def test_what_cannot_be_recorded_fails_no_request() -> None:
    async with running_cluster("p1", "d1") as cluster:
        broken = Mock(finished=Mock(side_effect=ValueError), refused=Mock(side_effect=ValueError))
        cluster.dispatcher.observers._observers.insert(0, broken)
        request = make_request()
        consumer = asyncio.create_task(collect(cluster.start(request)))
        await play_whole(Player(cluster, "p1"))
        assert await consumer == expected_tokens(request)
        assert broken.finished.called
        assert len(cluster.records) == 1, "the other observers are told"


async def test_requests_beyond_the_instances_credit_wait_in_the_router() -> None:
    async with running_cluster("p1", "d1", routing=replace(ROUTING, max_outstanding_tokens=2)) as cluster:
        running = [cluster.start(make_request(f"r{i}")) for i in range(3)]
        player = Player(cluster, "p1")
        await player.start_prefill()
        assert not player.prefill.commands
        await player.finish_prefill()
        assert not player.prefill.commands, "the decode instance has room for no other"
        await player.commit()
        assert player.prefill.take(Submit).request.request_id == "r1"
        await running[2].aclose()
        await running[1].aclose()
        assert isinstance(player.prefill.take(Cancel), Cancel)
        assert not player.prefill.commands
        await running[0].aclose()

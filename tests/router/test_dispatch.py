"""One request's life, with workers whose every event the test sends."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from core.errors import (
    ContextLengthError,
    DeadlineError,
    DuplicateRequestError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    StaleEpochError,
    TandemError,
    TransferError,
    UnavailableError,
)
from core.request import FinishReason, SamplingParams
from core.session import (
    Cancel,
    DecodeFrame,
    DecodeTokens,
    InstanceState,
    OpenDecode,
    PrefillStarted,
    RequestFailed,
    Role,
    SubmitPrefill,
)
from core.timeline import PARTS, Stage
from router.running import RetryPolicy, RunningRequest
from tests.router.fakes import (
    Cluster,
    Player,
    collect,
    expected_tokens,
    finished_event,
    make_request,
    make_status,
    next_tokens,
    running_cluster,
    settle,
    until,
)


async def play_whole(player: Player) -> None:
    await player.start_prefill()
    await player.finish_prefill()
    await player.commit()
    await player.generate(2)
    await player.generate(2, skip=3, last=True)


async def collect_until(error: type[TandemError], running: RunningRequest) -> list[int]:
    """The tokens that came before it failed with that error."""
    received: list[int] = []
    try:
        async for tokens in running:
            received.extend(token.token_id for token in tokens)
    except error:
        return received
    raise AssertionError(f"the request did not fail with {error.__name__}")


# --- the usual way ---------------------------------------------------------------------------------------------------


async def test_whole_road() -> None:
    async with running_cluster("p1", "d1") as cluster:
        request = make_request()
        running = cluster.start(request)
        player = Player(cluster, "p1")
        consumer = asyncio.create_task(collect(running))
        await play_whole(player)
        assert await consumer == expected_tokens(request)
        assert running.finish_reason is FinishReason.LENGTH
        source = player.open.source
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
        async with asyncio.timeout(1):
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
            items = tuple(DecodeTokens(p.open.handle, next_tokens(p.open.request, 1, skip), last) for p in players)
            cluster.session("d1").push(DecodeFrame(items, 0.001))
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
        assert timeline.num_prompt_tokens, timeline.num_output_tokens == (3, 5)
        assert timeline.num_cached_tokens == 1


async def play_rest(player: Player) -> None:
    await player.finish_prefill()
    await player.commit()
    await player.generate(4, last=True)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("present", "missing"), [((), "prefill"), (("p1",), "decode"), (("d1",), "prefill")])
async def test_without_a_pair_the_missing_role_is_named(present: tuple[str, ...], missing: str) -> None:
    async with running_cluster(*present) as cluster:
        with pytest.raises(UnavailableError, match=f"no {missing} worker is ready"):
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
        cluster.fleet.heartbeat(make_status("d1", Role.DECODE, fingerprint="other"))
        await until(lambda: cluster.instance("d1").connected)
        with pytest.raises(UnavailableError, match="whose KV"):
            cluster.start(make_request())
        assert not cluster.fleet.has_pair()


async def test_running_id_is_refused_and_a_finished_one_is_not() -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request("same"))
        with pytest.raises(DuplicateRequestError):
            cluster.start(make_request("same"))
        await running.aclose()
        again = cluster.start(make_request("same"))
        await again.aclose()


async def test_full_queue_refuses() -> None:
    async with running_cluster("p1", "d1", max_queue=2) as cluster:
        first = cluster.start(make_request("a"))
        second = cluster.start(make_request("b"))
        with pytest.raises(OverloadedError):
            cluster.start(make_request("c"))
        assert (cluster.dispatcher.queued_requests, cluster.dispatcher.running_requests) == (2, 0)
        await first.aclose()
        third = cluster.start(make_request("c"))
        await asyncio.gather(second.aclose(), third.aclose())


# --- cancel and deadline in every phase ------------------------------------------------------------------------------

Step = Callable[[Player], Awaitable[None]]


async def queued(player: Player) -> None:
    await player.take_submit()


async def prefilling(player: Player) -> None:
    await player.start_prefill()


async def transferring(player: Player) -> None:
    await player.start_prefill()
    await player.finish_prefill()


async def decoding(player: Player) -> None:
    await transferring(player)
    await player.commit()
    await player.generate(2)


PHASES = pytest.mark.parametrize("phase", [queued, prefilling, transferring, decoding])


def assert_cancelled_everywhere(player: Player, phase: Step) -> None:
    if phase is not decoding:  # else the lease has been acknowledged, and prefill holds nothing
        assert player.prefill.take(Cancel).handle == player.submit.handle
    if phase is not queued:
        assert player.decode.take(Cancel).handle == player.open.handle
    assert not player.prefill.commands
    assert not player.decode.commands


@PHASES
async def test_close_cancels_on_both_workers_at_once(phase: Step) -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request())
        player = Player(cluster, "p1")
        await phase(player)
        await running.aclose()
        assert_cancelled_everywhere(player, phase)
        await running.aclose()
        assert not player.prefill.commands
        assert running.finish_reason is FinishReason.CANCELLED
        assert [record.outcome for record in cluster.records] == ["cancelled"]
        assert Stage.FINISHED in running.timeline().stamps
        instances = cluster.fleet.instances
        assert [(it.open_requests, it.queued_tokens, it.held_tokens) for it in instances] == [(0, 0, 0)] * 2
        with pytest.raises(StopAsyncIteration):
            await anext(running)


@PHASES
async def test_deadline_cancels_on_both_workers(phase: Step) -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request(deadline_s=time.monotonic() + 0.15))
        player = Player(cluster, "p1")
        await phase(player)
        received = await collect_until(DeadlineError, running)
        assert received == expected_tokens(make_request())[: len(received)]
        assert_cancelled_everywhere(player, phase)
        assert [record.outcome for record in cluster.records] == ["deadline_exceeded"]


async def test_request_without_deadline_gets_the_routers() -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request())
        assert running.request.deadline_s < time.monotonic() + 31
        await running.aclose()


async def test_past_deadline_is_refused() -> None:
    async with running_cluster("p1", "d1") as cluster:
        with pytest.raises(DeadlineError):
            cluster.start(make_request(deadline_s=time.monotonic() - 1))


async def test_close_while_another_task_waits_for_tokens() -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request())
        consumer = asyncio.create_task(collect(running))
        await settle()
        await running.aclose()
        assert await consumer == []


async def test_consumer_that_found_its_stop_string_is_not_cancelled() -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request())
        player = Player(cluster, "p1")
        await transferring(player)
        await anext(running)
        running.finish_reason = FinishReason.STOP
        await running.aclose()
        assert [record.outcome for record in cluster.records] == ["stop"]
        assert_cancelled_everywhere(player, transferring)


# --- loss of workers -------------------------------------------------------------------------------------------------


async def run_on_second_pair(cluster: Cluster, player: Player) -> None:
    """Play the rest on whichever pair the router now chose."""
    await player.start_prefill()
    await player.finish_prefill()
    await player.commit()
    left = player.open.request.sampling.max_tokens - player.open.request.num_output_tokens - 1
    await player.generate(left, last=True)


async def both_prefills(cluster: Cluster) -> tuple[str, str]:
    """(the one that has the request, the other)"""
    await until(lambda: cluster.session("p1").commands or cluster.session("p2").commands)
    return ("p1", "p2") if cluster.session("p1").commands else ("p2", "p1")


@pytest.mark.parametrize("phase", [queued, prefilling, transferring])
async def test_prefill_worker_dies(phase: Step) -> None:
    async with running_cluster("p1", "p2", "d1") as cluster:
        request = make_request()
        running = cluster.start(request)
        consumer = asyncio.create_task(collect(running))
        used, other = await both_prefills(cluster)
        player = Player(cluster, used)
        await phase(player)
        player.prefill.cut()
        if phase is not queued:
            await until(lambda: player.decode.commands)
            assert player.decode.take(Cancel).handle == player.open.handle
        second = Player(cluster, other)
        await run_on_second_pair(cluster, second)
        assert await consumer == expected_tokens(request)
        assert second.submit.request.epoch == 1
        assert second.submit.request.num_output_tokens == (1 if phase is transferring else 0)
        timeline = running.timeline()
        assert timeline.num_attempts == 2
        assert sum(timeline.parts().values()) == pytest.approx(timeline.total_s)


async def test_prefill_worker_that_dies_after_the_acknowledgement_is_not_missed() -> None:
    async with running_cluster("p1", "d1") as cluster:
        request = make_request()
        running = cluster.start(request)
        consumer = asyncio.create_task(collect(running))
        player = Player(cluster, "p1")
        await decoding(player)
        player.prefill.cut()
        await settle()
        await player.generate(2, skip=3, last=True)
        assert await consumer == expected_tokens(request)
        assert running.timeline().num_attempts == 1


@pytest.mark.parametrize("phase", [prefilling, transferring, decoding])
async def test_decode_worker_dies(phase: Step) -> None:
    async with running_cluster("p1", "d1") as cluster:
        request = make_request()
        running = cluster.start(request)
        consumer = asyncio.create_task(collect(running))
        player = Player(cluster, "p1", "d1")
        await phase(player)
        await cluster.join("d2")
        player.decode.cut()
        if phase is not decoding:
            await until(lambda: player.prefill.commands)
            assert player.prefill.take(Cancel).handle == player.submit.handle
        second = Player(cluster, "p1", "d2")
        await run_on_second_pair(cluster, second)
        assert await consumer == expected_tokens(request)
        assert second.submit.request.num_output_tokens == {prefilling: 0, transferring: 1, decoding: 3}[phase]
        assert cluster.records[0].attempts[0].failure == "unavailable"
        assert "attempt 2, decode on d2" in cluster.log.explain(request.request_id)


async def test_without_resume_a_lost_stream_ends_unavailable_after_what_was_sent() -> None:
    async with running_cluster("p1", "d1", retry=RetryPolicy(resume=False)) as cluster:
        running = cluster.start(make_request())
        player = Player(cluster, "p1")
        await decoding(player)
        player.decode.cut()
        received = await collect_until(UnavailableError, running)
        assert received == expected_tokens(make_request())[:3]
        assert cluster.records[0].outcome == "unavailable"


async def test_without_resume_a_request_that_sent_nothing_is_still_repeated() -> None:
    async with running_cluster("p1", "p2", "d1", retry=RetryPolicy(resume=False)) as cluster:
        request = make_request()
        consumer = asyncio.create_task(collect(cluster.start(request)))
        used, other = await both_prefills(cluster)
        cluster.session(used).cut()
        await run_on_second_pair(cluster, Player(cluster, other))
        assert await consumer == expected_tokens(request)


@pytest.mark.parametrize("error", [TransferError("torn"), StaleEpochError("old"), UnavailableError("out of memory")])
async def test_failed_attempt_is_repeated_on_the_only_pair(error: TandemError) -> None:
    async with running_cluster("p1", "d1") as cluster:
        request = make_request()
        consumer = asyncio.create_task(collect(cluster.start(request)))
        player = Player(cluster, "p1")
        await transferring(player)
        await player.fail_decode(error)
        assert player.prefill.take(Cancel).handle == player.submit.handle
        await run_on_second_pair(cluster, Player(cluster, "p1"))
        assert await consumer == expected_tokens(request)


async def test_transfer_failure_goes_to_another_pair_if_there_is_one() -> None:
    async with running_cluster("p1", "d1") as cluster:
        consumer = asyncio.create_task(collect(cluster.start(make_request())))
        player = Player(cluster, "p1")
        await transferring(player)
        await cluster.join("p2", "d2")
        await player.fail_decode(TransferError("torn"))
        await run_on_second_pair(cluster, Player(cluster, "p2", "d2"))
        assert await consumer == expected_tokens(make_request())


async def test_gives_up_after_the_last_attempt() -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request())
        consumer = asyncio.create_task(collect(running))
        for _ in range(3):
            player = Player(cluster, "p1")
            await player.start_prefill()
            await player.fail_decode(TransferError("the KV did not arrive whole"))
            player.prefill.take(Cancel)
        with pytest.raises(UnavailableError, match="did not arrive whole"):
            await consumer
        assert not player.prefill.commands
        assert [attempt.failure for attempt in cluster.records[0].attempts] == ["transfer_failed"] * 3


async def test_gives_up_when_no_pair_comes_back_in_time() -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request())
        cluster.workers.refusing.add("p1")
        cluster.session("p1").cut()
        with pytest.raises(UnavailableError, match="prefill"):
            await collect(running)


async def test_waits_for_a_session_that_is_opened_again() -> None:
    async with running_cluster("p1", "d1") as cluster:
        request = make_request()
        consumer = asyncio.create_task(collect(cluster.start(request)))
        first = cluster.session("p1")
        first.cut()
        await until(lambda: cluster.session("p1") is not first and cluster.session("p1").commands)
        await run_on_second_pair(cluster, Player(cluster, "p1"))
        assert await consumer == expected_tokens(request)


@pytest.mark.parametrize("error", [InvalidRequestError("bad"), ContextLengthError("long"), InternalError("bug")])
async def test_faults_of_the_request_are_not_repeated(error: TandemError) -> None:
    async with running_cluster("p1", "p2", "d1") as cluster:
        running = cluster.start(make_request())
        used, other = await both_prefills(cluster)
        player = Player(cluster, used)
        await player.take_submit()
        player.prefill.push(RequestFailed(player.submit.handle, error.code, error.message))
        with pytest.raises(type(error), match=error.message):
            await collect(running)
        assert not cluster.session(other).sent


async def test_full_worker_is_passed_over_and_a_full_fleet_is_told() -> None:
    async with running_cluster("p1", "p2", "d1") as cluster:
        running = cluster.start(make_request())
        consumer = asyncio.create_task(collect(running))
        for instance_id in await both_prefills(cluster):
            player = Player(cluster, instance_id)
            await player.take_submit()
            player.prefill.push(RequestFailed(player.submit.handle, "overloaded", "the queue is full"))
        with pytest.raises(OverloadedError):
            await consumer


async def test_events_of_an_older_attempt_are_dropped() -> None:
    async with running_cluster("p1", "p2", "d1") as cluster:
        request = make_request()
        consumer = asyncio.create_task(collect(cluster.start(request)))
        used, other = await both_prefills(cluster)
        old = Player(cluster, used)
        await transferring(old)
        old.prefill.cut()
        new = Player(cluster, other)
        await until(lambda: new.prefill.commands)
        await old.commit()
        await old.generate(4, last=True)
        old.decode.take(Cancel)
        await run_on_second_pair(cluster, new)
        assert await consumer == expected_tokens(request)


async def test_worker_that_sends_too_many_tokens() -> None:
    async with running_cluster("p1", "d1") as cluster:
        running = cluster.start(make_request())
        player = Player(cluster, "p1")
        await transferring(player)
        await player.commit()
        await player.generate(5)
        with pytest.raises(InternalError):
            await collect(running)
        assert player.decode.take(Cancel).handle == player.open.handle


async def test_prompt_logprobs_are_asked_for_once() -> None:
    async with running_cluster("p1", "d1") as cluster:
        request = make_request(sampling=SamplingParams(max_tokens=5, prompt_logprobs=0))
        running = cluster.start(request)
        consumer = asyncio.create_task(collect(running))
        player = Player(cluster, "p1")
        await player.start_prefill()
        event = finished_event(player.submit.handle, player.submit.request)
        player.prefill.push(replace(event, prompt_logprobs=(None, None, None)))
        await settle()
        assert running.prompt_logprobs == (None, None, None)
        await player.fail_decode(TransferError("torn"))
        player.prefill.take(Cancel)
        second = Player(cluster, "p1")
        await run_on_second_pair(cluster, second)
        await consumer
        assert second.submit.request.sampling.prompt_logprobs is None
        assert running.prompt_logprobs == (None, None, None)


# --- drain -----------------------------------------------------------------------------------------------------------


async def test_draining_instance_finishes_and_takes_nothing_new() -> None:
    async with running_cluster("p1", "p2", "d1") as cluster:
        request = make_request()
        consumer = asyncio.create_task(collect(cluster.start(request)))
        used, other = await both_prefills(cluster)
        cluster.fleet.heartbeat(make_status(used, Role.PREFILL, state=InstanceState.DRAINING))
        player = Player(cluster, used)
        for i in range(4):
            running = cluster.start(make_request(f"new{i}"))
            assert cluster.session(other).take(SubmitPrefill).request.request_id == f"new{i}"
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
            c.handle for c in commands if isinstance(c, SubmitPrefill)
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


async def test_load_spreads_over_both_roles() -> None:
    async with running_cluster("p1", "p2", "d1", "d2") as cluster:
        running = [cluster.start(make_request(f"r{i}", (i, i, i))) for i in range(6)]
        for instance_id in ("p1", "p2"):
            session = cluster.session(instance_id)
            assert len(session.commands) == 3
            session.push(*(PrefillStarted(command.handle, 0) for command in session.commands))
        await settle()
        for instance_id in ("d1", "d2"):
            assert sum(isinstance(command, OpenDecode) for command in cluster.session(instance_id).commands) == 3
        for each in running:
            await each.aclose()

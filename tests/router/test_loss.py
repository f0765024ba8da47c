"""Workers that die or fail in every phase: the request goes on elsewhere, or ends with one error."""

import asyncio
from dataclasses import replace

import pytest

from tandem.core.errors import (
    ContextLengthError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    StaleEpochError,
    TandemError,
    TransferError,
    UnavailableError,
)
from tandem.core.request import SamplingParams
from tandem.core.session import (
    Cancel,
    RequestFailed,
    Submit,
)
from tests.router.fakes import (
    ROUTING,
    Cluster,
    Player,
    Step,
    both_prefills,
    collect,
    collect_until,
    decoding,
    expected_tokens,
    finished_event,
    make_request,
    prefilling,
    queued,
    running_cluster,
    settle,
    transferring,
    until,
)


async def run_on_second_pair(cluster: Cluster, player: Player) -> None:
    """Play the rest on whichever pair the router now chose."""
    await player.start_prefill()
    await player.finish_prefill()
    await player.commit()
    left = player.open.request.sampling.max_tokens - player.open.request.num_output_tokens - 1
    await player.generate(left, last=True)


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


async def test_decode_worker_dies_while_it_decodes() -> None:
    async with running_cluster("p1", "d1") as cluster:
        request = make_request()
        running = cluster.start(request)
        consumer = asyncio.create_task(collect(running))
        player = Player(cluster, "p1", "d1")
        await decoding(player)
        await cluster.join("d2")
        player.decode.cut()
        second = Player(cluster, "p1", "d2")
        await run_on_second_pair(cluster, second)
        assert await consumer == expected_tokens(request)
        assert second.submit.request.num_output_tokens == 3
        assert cluster.records[0].attempts[0].failure == "unavailable"
        assert "attempt 2, decode on d2" in cluster.log.explain(request.request_id)


@pytest.mark.parametrize("phase", [prefilling, transferring])
async def test_another_decode_worker_reads_the_kv_of_one_that_dies(phase: Step) -> None:
    async with running_cluster("p1", "d1") as cluster:
        request = make_request()
        running = cluster.start(request)
        consumer = asyncio.create_task(collect(running))
        player = Player(cluster, "p1", "d1")
        await phase(player)
        await cluster.join("d2")
        player.decode.cut()
        player.decode = cluster.session("d2")
        await until(lambda: player.decode.commands)
        first, player.open = player.open, player.decode.take(Submit)
        assert player.open == first
        if phase is prefilling:
            await player.finish_prefill()
        await player.commit()
        await player.generate(4, last=True)
        assert await consumer == expected_tokens(request)
        assert not player.prefill.commands, "the prompt was computed once"
        attempts = cluster.records[0].attempts
        assert [(each.decode_id, each.failure) for each in attempts] == [("d1", "unavailable"), ("d2", None)]
        told = [line for line in cluster.log.explain(request.request_id).splitlines() if line.startswith("attempt")]
        assert told == [
            "attempt 1, prefill on p1:",
            "attempt 1, decode on d1:",
            "attempt 1 failed: unavailable",
            "attempt 2, decode on d2:",
        ]


@pytest.mark.parametrize("phase", [prefilling, transferring])
async def test_kv_without_a_reader_is_given_up(phase: Step) -> None:
    async with running_cluster("p1", "d1") as cluster:
        consumer = asyncio.create_task(collect(cluster.start(make_request())))
        player = Player(cluster, "p1", "d1")
        await phase(player)
        player.decode.cut()
        await until(lambda: player.prefill.commands)
        assert player.prefill.take(Cancel).handle == player.submit.handle
        await until(lambda: cluster.is_usable("d1"))
        await run_on_second_pair(cluster, Player(cluster, "p1", "d1"))
        assert await consumer == expected_tokens(make_request())


async def test_without_resume_a_lost_stream_ends_unavailable_after_what_was_sent() -> None:
    async with running_cluster("p1", "d1", routing=replace(ROUTING, resume=False)) as cluster:
        running = cluster.start(make_request())
        player = Player(cluster, "p1")
        await decoding(player)
        player.decode.cut()
        received = await collect_until(UnavailableError, running)
        assert received == expected_tokens(make_request())[:3]
        assert cluster.records[0].outcome == "unavailable"


async def test_without_resume_a_request_that_sent_nothing_is_still_repeated() -> None:
    async with running_cluster("p1", "p2", "d1", routing=replace(ROUTING, resume=False)) as cluster:
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

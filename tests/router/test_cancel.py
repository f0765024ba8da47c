"""Cancelled, or out of time, in every phase: both workers are told at once."""

import asyncio
import time

import pytest

from tandem.core.errors import DeadlineError
from tandem.core.request import FinishReason
from tandem.core.session import Cancel
from tandem.core.timeline import Stage
from tests.router.fakes import (
    Player,
    Step,
    collect,
    collect_until,
    decoding,
    expected_tokens,
    make_request,
    prefilling,
    queued,
    running_cluster,
    settle,
    transferring,
)

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

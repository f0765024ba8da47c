"""Heartbeats over a real channel."""

import asyncio

import pytest

from tandem.core.replanning import ReplanStatus
from tandem.core.session import InstanceStatus, Role
from tandem.core.workload_profile import ProfileSnapshot
from tandem.v1 import worker_pb2_grpc
from tandem.wire.fleet import FleetDescription, FleetServicer
from tandem.wire.server import bind, build_server
from tandem.worker.heartbeat import Heartbeat
from tests.instance_status import make_status


class Registry:
    """Calls `on_heartbeat` while a heartbeat is under way."""

    def __init__(self) -> None:
        self.statuses: list[InstanceStatus] = []
        self.on_heartbeat = lambda: None

    def heartbeat(self, status: InstanceStatus) -> None:
        self.statuses.append(status)
        self.on_heartbeat()

    def describe(self) -> FleetDescription:
        raise AssertionError("nobody asks")

    def profile(self) -> ProfileSnapshot | None:
        raise AssertionError("nobody asks")

    def replan_reported(self, status: ReplanStatus) -> None:
        raise AssertionError("nobody reports it")


async def test_a_change_while_a_heartbeat_is_under_way_is_sent_at_once() -> None:
    """Fault C8: the wake-up was lost, and the change waited for the next interval."""
    registry, steps = Registry(), 0
    server, _ = build_server(None)
    worker_pb2_grpc.add_FleetServiceServicer_to_server(FleetServicer(registry), server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    heartbeat = Heartbeat([address], None, 3600.0, lambda: make_status("d", Role.DECODE, steps=steps))

    arrived = asyncio.Event()

    def change() -> None:
        nonlocal steps
        if len(registry.statuses) == 4:
            arrived.set()
        else:
            steps += 1
            heartbeat.send_now()

    registry.on_heartbeat = change
    task = asyncio.create_task(heartbeat.run())
    async with asyncio.timeout(5):
        await arrived.wait()
    assert [status.steps for status in registry.statuses] == [0, 1, 2, 3]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await server.stop(None)


async def test_a_status_that_cannot_be_sent_ends_the_heartbeats() -> None:
    """Whoever runs them must see the end; `worker.app` then ends the instance."""
    heartbeat = Heartbeat(["127.0.0.1:1"], None, 0.01, lambda: make_status("d", Role.DECODE, steps=1 << 80))
    async with asyncio.timeout(5):
        with pytest.raises(ExceptionGroup):
            await heartbeat.run()

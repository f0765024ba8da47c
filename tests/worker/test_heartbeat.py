"""Heartbeats over a real channel."""

import asyncio
import socket

import pytest

from tandem.core.address import split_address
from tandem.core.replanning import ReplanStatus
from tandem.core.session import InstanceStatus, Role
from tandem.core.workload_profile import ProfileSnapshot
from tandem.v1 import worker_pb2_grpc
from tandem.wire.fleet import FleetDescription, FleetServicer
from tandem.wire.server import bind, build_server
from tandem.worker import heartbeat as heartbeat_module
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
    """The change does not wait for the next interval."""
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


async def test_a_name_stands_for_all_its_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two routers behind one name, one leaves DNS and still takes heartbeats, then ends; another one comes."""
    registries = {ip: Registry() for ip in ("127.0.0.1", "127.0.0.2", "127.0.0.3")}
    servers, port = {}, 0
    for ip, registry in registries.items():
        servers[ip], _ = build_server(None)
        worker_pb2_grpc.add_FleetServiceServicer_to_server(FleetServicer(registry), servers[ip])
        port = split_address(bind(servers[ip], f"{ip}:{port}"))[1]
        await servers[ip].start()
    in_dns: list[str] = []

    async def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        if not in_dns:
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in in_dns]

    async def heard(*ips: str) -> None:
        """A report has come since this call at each of them."""
        before = {ip: len(registries[ip].statuses) for ip in ips}
        async with asyncio.timeout(10):
            while any(len(registries[ip].statuses) == count for ip, count in before.items()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(heartbeat_module, "RESOLVE_EVERY_S", 0.02)
    heartbeat = Heartbeat([f"routers.test:{port}"], None, 0.02, lambda: make_status("d", Role.DECODE))
    task = asyncio.create_task(heartbeat.run())
    await asyncio.sleep(0.1)
    in_dns[:] = ["127.0.0.1", "127.0.0.2"]
    await heard("127.0.0.1", "127.0.0.2")
    in_dns[:] = ["127.0.0.2"]
    await asyncio.sleep(0.1)
    await heard("127.0.0.1", "127.0.0.2")
    await servers["127.0.0.1"].stop(None)
    in_dns[:] = ["127.0.0.2", "127.0.0.3"]
    await heard("127.0.0.2", "127.0.0.3")
    async with asyncio.timeout(10):
        while f"heartbeat-127.0.0.1:{port}" in {each.get_name() for each in asyncio.all_tasks()}:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for server in servers.values():
        await server.stop(None)


async def test_routers_are_replaced_while_it_runs() -> None:
    registries, addresses, servers = [Registry(), Registry()], [], []
    for registry in registries:
        server, _ = build_server(None)
        worker_pb2_grpc.add_FleetServiceServicer_to_server(FleetServicer(registry), server)
        addresses.append(bind(server, "127.0.0.1:0"))
        await server.start()
        servers.append(server)
    heartbeat = Heartbeat(addresses[:1], None, 0.01, lambda: make_status("d", Role.DECODE))
    task = asyncio.create_task(heartbeat.run())
    async with asyncio.timeout(10):
        while not registries[0].statuses:  # noqa: ASYNC110 - a list tells no event
            await asyncio.sleep(0.01)
        assert registries[1].statuses == []
        heartbeat.set_routers(addresses[1:])
        while not registries[1].statuses:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    before = len(registries[0].statuses)
    await asyncio.sleep(0.1)
    assert len(registries[0].statuses) <= before + 1, "one may have been on its way"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for server in servers:
        await server.stop(None)


async def test_a_status_that_cannot_be_sent_ends_the_heartbeats() -> None:
    """Whoever runs them must see the end; `worker.app` then ends the instance."""
    heartbeat = Heartbeat(["127.0.0.1:1"], None, 0.01, lambda: make_status("d", Role.DECODE, steps=1 << 80))
    async with asyncio.timeout(5):
        with pytest.raises(ExceptionGroup):
            await heartbeat.run()

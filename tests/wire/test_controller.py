"""ControllerService over a real channel."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from tandem.core.cluster_status import ClusterChange, ClusterStatus, ProcessState, ProcessStatus
from tandem.core.errors import NotFoundError, UnavailableError
from tandem.v1 import controller_pb2_grpc
from tandem.wire.channels import open_channel
from tandem.wire.controller import ControllerClient, ControllerServicer
from tandem.wire.server import bind, build_server

CHANGE = ClusterChange(("a-0",), ("b-0", "b-1"), ("c-0",))
STATUS = ClusterStatus(
    "tiny",
    (
        ProcessStatus("router-0", "router", ProcessState.UP, 7, "127.0.0.1:1", "router-1f"),
        ProcessStatus("decode-0", "decode", ProcessState.WAITING, failures=2, note="it died"),
    ),
    ("127.0.0.1:2",),
)


class Handler:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def apply(self, serve_file_json: str, grace_s: float | None, plan_json: str) -> ClusterChange:
        self.calls.append(("apply", serve_file_json, grace_s, plan_json))
        return CHANGE

    def status(self) -> ClusterStatus:
        return STATUS

    async def scale(self, instances: Mapping[str, int], grace_s: float | None) -> ClusterChange:
        self.calls.append(("scale", dict(instances), grace_s))
        return CHANGE

    async def drain(self, process: str, grace_s: float | None, *, undo: bool) -> ClusterChange:
        if process != "decode-0":
            raise NotFoundError(f"there is no '{process}'")
        self.calls.append(("drain", undo, grace_s))
        return CHANGE

    async def set_role(self, process: str, role: str) -> None:
        self.calls.append(("role", process, role))

    async def stop(self, grace_s: float | None) -> None:
        self.calls.append(("stop", grace_s))

    async def logs(self, process: str, num_past: int, *, follow: bool) -> AsyncIterator[tuple[str, ...]]:
        if process != "decode-0":
            raise NotFoundError(f"there is no '{process}'")
        yield (f"last {num_past}",)
        if follow:
            yield ("later", "lines")

    async def watch(self, num_past: int) -> AsyncIterator[str]:
        for number in range(num_past):
            yield f"line {number}"

    def router_announced(self, control: str) -> float:
        self.calls.append(("router", control))
        return 15.0


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture
async def address(handler: Handler) -> AsyncIterator[str]:
    server, _ = build_server("secret")
    controller_pb2_grpc.add_ControllerServiceServicer_to_server(ControllerServicer(handler), server)
    bound = bind(server, "127.0.0.1:0")
    await server.start()
    yield bound
    await server.stop(None)


async def test_every_call_arrives_as_it_was_sent(handler: Handler, address: str) -> None:
    async with open_channel(address, "secret") as channel:
        client = ControllerClient(channel)
        assert await client.status() == STATUS
        assert await client.apply('{"model": "/m"}', None, "{}") == CHANGE
        assert await client.scale({"decode": 2}, 0.0) == CHANGE
        assert await client.drain("decode-0", 3.0, undo=True) == CHANGE
        await client.set_role("decode-0", "prefill")
        await client.stop()
        assert await client.announce_router("10.0.0.2:8002") == 15.0
        assert [line async for line in await client.watch("secret", 2)] == ["line 0", "line 1"]
        for follow, lines in ((False, [("last 3",)]), (True, [("last 3",), ("later", "lines")])):
            assert [part async for part in client.logs("secret", "decode-0", 3, follow=follow)] == lines
        with pytest.raises(NotFoundError, match="there is no 'x'"):
            await client.drain("x")
        with pytest.raises(NotFoundError, match="there is no 'x'"):
            await anext(aiter(client.logs("secret", "x", 3, follow=False)))
    assert handler.calls == [
        ("apply", '{"model": "/m"}', None, "{}"),
        ("scale", {"decode": 2}, 0.0),
        ("drain", True, 3.0),
        ("role", "decode-0", "prefill"),
        ("stop", None),
        ("router", "10.0.0.2:8002"),
    ]


async def test_nobody_without_the_token_changes_a_cluster(handler: Handler, address: str) -> None:
    async with open_channel(address) as channel:
        client = ControllerClient(channel)
        with pytest.raises(Exception, match="needs the cluster token"):
            await client.stop()
        with pytest.raises(Exception, match="needs the cluster token"):
            [line async for line in await client.watch(None)]
    assert handler.calls == []


async def test_a_controller_that_is_away() -> None:
    async with open_channel("127.0.0.1:1", "secret") as channel:
        with pytest.raises(UnavailableError):
            await ControllerClient(channel).status()

"""Changes of a cluster whose processes are only objects. It has no router, so nothing is asked over a network."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tandem.core.clock import SystemClock
from tandem.core.cluster_status import ClusterChange, ProcessState
from tandem.core.config import ServeConfig
from tandem.core.errors import CheckpointError, ConfigError, InvalidRequestError, NotFoundError, UnavailableError
from tandem.deploy.desired import Desired
from tandem.deploy.serving import Serving
from tandem.deploy.topology import Machine
from tests.deploy.fake_launcher import FakeLauncher

DESIRED = Desired(ServeConfig(model=Path("/m"), cluster_token="secret"), 3.0, frozenset({"router-0"}))


@pytest.fixture
def launcher() -> FakeLauncher:
    return FakeLauncher()


@pytest.fixture
def saved() -> list[Desired]:
    return []


@pytest.fixture
async def serving(launcher: FakeLauncher, saved: list[Desired]) -> AsyncIterator[Serving]:
    async def save(desired: Desired) -> None:
        saved.append(desired)

    serving = Serving(DESIRED, lambda: Machine(cores=2), launcher, SystemClock(), save=save)
    await serving.start()
    yield serving
    await serving.stop(0.0)


def running(serving: Serving) -> list[str]:
    return [info.name for info in serving.controller.running()]


async def test_a_change_is_saved_before_it_is_done(
    serving: Serving, launcher: FakeLauncher, saved: list[Desired]
) -> None:
    launcher.hold = True
    scaling = asyncio.create_task(serving.scale({"decode": 2}))
    await asyncio.sleep(0.01)
    assert saved[-1].config.decode[0].instances == 2
    assert not scaling.done()
    await serving.stop(0.0)
    with pytest.raises(UnavailableError, match="is being stopped"):
        await scaling
    with pytest.raises(UnavailableError, match="is being stopped"):
        await serving.scale({"decode": 1})


async def test_settings_are_applied(serving: Serving, saved: list[Desired]) -> None:
    settings = {"model": "/m", "prefill": {"instances": 2}, "decode": {"max_queue": 7}}
    change = await serving.apply(json.dumps(settings))
    assert change == ClusterChange(started=("prefill-1",), replaced=("decode-0",))
    assert running(serving) == ["prefill-0", "prefill-1", "decode-0"]
    assert await serving.apply(json.dumps(settings)) == ClusterChange(), "nothing is left to do"
    for wrong in ("{", "[]", '{"model": "/m", "colour": "red"}'):
        with pytest.raises(InvalidRequestError, match="not the settings of a serve file"):
            await serving.apply(wrong)
    assert saved[-1] == serving.desired


async def test_settings_put_instances_back_to_the_nodes_of_their_plan(launcher: FakeLauncher) -> None:
    async def misplaced() -> list[str]:
        return ["decode-0"]

    serving = Serving(DESIRED, lambda: Machine(cores=2), launcher, SystemClock(), find_misplaced=misplaced)
    await serving.start()
    lines = serving.watch(num_past=0)
    assert await serving.scale({"prefill": 2}) == ClusterChange(started=("prefill-1",))
    settings = {"model": "/m", "prefill": {"instances": 2}, "decode": {}}
    assert await serving.apply(json.dumps(settings)) == ClusterChange(replaced=("decode-0",))
    assert "  decode-0 goes where the plan has it" in [await anext(lines) for _ in range(4)]
    await serving.stop(0.0)


async def test_more_instances_than_fit_are_warned_of(launcher: FakeLauncher) -> None:
    """Of the memory that is free now, which is not what the running instances have."""
    serving = Serving(DESIRED, lambda: Machine(cores=2), launcher, SystemClock(), available_memory=lambda: 1100 << 20)
    await serving.start()
    lines = serving.watch(num_past=0)
    await serving.scale({"decode": 2})
    await serving.scale({"decode": 4})
    settings = {"model": "/m", "prefill": {"instances": 4}, "decode": {"instances": 4}}
    await serving.apply(json.dumps(settings))
    assert [await anext(lines) for _ in range(8)] == [
        "scaling to 2 decode",
        "scaled",
        "scaling to 4 decode",
        "  warning: 1.0 GiB more of KV pools and 0.0 GiB of weights, 1.1 GiB available; lower "
        "prefill.engine.kv_memory and decode.engine.kv_memory, or run fewer instances",
        "scaled",
        "applying settings",
        "  warning: 1.5 GiB more of KV pools and 0.0 GiB of weights, 1.1 GiB available; lower "
        "prefill.engine.kv_memory and decode.engine.kv_memory, or run fewer instances",
        "applied",
    ]
    await serving.stop(0.0)


async def test_an_instance_too_many_goes_on_as_one_that_is_missing(
    serving: Serving, launcher: FakeLauncher, saved: list[Desired]
) -> None:
    await serving.scale({"prefill": 2})
    lines = serving.watch(num_past=0)
    assert await serving.scale({"prefill": 1, "decode": 2}) == ClusterChange()
    assert [await anext(lines) for _ in range(3)][1:] == ["  prefill-1 goes on as decode-1", "scaled"]
    assert len(launcher.launched) == 3
    assert [(each.name, each.role) for each in serving.status().processes if each.instance_id] == [
        ("prefill-0", "prefill"),
        ("decode-0", "decode"),
        ("prefill-1", "decode"),
    ]
    assert saved[-1] == serving.desired


async def test_a_drained_process_stays_out(serving: Serving, launcher: FakeLauncher) -> None:
    assert await serving.drain("decode-0", 5.0) == ClusterChange(stopped=("decode-0",))
    assert launcher.launched[1].graces == [5.0]
    await serving.scale({"prefill": 2})
    assert running(serving) == ["prefill-0", "prefill-1"]
    states = {process.name: process.state for process in serving.status().processes}
    assert states["decode-0"] is ProcessState.DRAINED
    assert await serving.drain("decode-0", undo=True) == ClusterChange(started=("decode-0",))
    with pytest.raises(NotFoundError, match="no process 'decode-9'; it has prefill-0, "):
        await serving.drain("decode-9")


async def test_a_change_survives_its_caller(serving: Serving, launcher: FakeLauncher) -> None:
    launcher.hold = True
    scaling = asyncio.create_task(serving.scale({"decode": 2}))
    await asyncio.sleep(0.01)
    scaling.cancel()
    await asyncio.gather(scaling, return_exceptions=True)
    assert launcher.abandoned == 0
    assert [process.state for process in serving.status().processes if process.name == "decode-1"] == [
        ProcessState.LOADING
    ]


async def test_a_failure_is_raised_and_said(serving: Serving, launcher: FakeLauncher) -> None:
    lines = serving.watch(num_past=10)
    launcher.errors.append(CheckpointError("the checkpoint has no config.json"))
    with pytest.raises(CheckpointError):
        await serving.scale({"decode": 2})
    assert [await anext(lines) for _ in range(2)] == [
        "scaling to 2 decode",
        "not done: the checkpoint has no config.json",
    ]


async def test_roles_that_cannot_be(serving: Serving, saved: list[Desired]) -> None:
    with pytest.raises(ConfigError, match="'router' is not a role; use one of prefill, decode, colocated"):
        await serving.set_role("decode-0", "router")
    with pytest.raises(UnavailableError):
        await serving.set_role("decode-0", "prefill")  # nobody listens there
    assert saved == [], "what an instance has not accepted is not remembered"


async def test_the_token_is_in_no_log_line() -> None:
    async def read(process: str, num_past: int, follow: bool) -> AsyncIterator[list[str]]:
        yield [f"{process} {num_past} {follow}", "Bearer secret!"]

    machine, clock = Machine(cores=2), SystemClock()
    serving = Serving(DESIRED, lambda: machine, FakeLauncher(), clock, read_log=read)
    lines = [part async for part in serving.logs("router-0", 3, follow=True)]
    assert lines == [["router-0 3 True", "Bearer ...!"]]
    without = Serving(DESIRED, lambda: machine, FakeLauncher(), clock)
    with pytest.raises(NotFoundError, match="does not know where the log of router-0 is"):
        await anext(without.logs("router-0", 3, follow=False))


async def test_routers_that_are_announced(serving: Serving) -> None:
    own = serving.status().routers
    assert serving.router_announced("10.0.0.2:8002") > 0
    assert serving.status().routers == (*own, "10.0.0.2:8002")
    with pytest.raises(ConfigError, match="not an address"):
        serving.router_announced("")

"""The controller with processes that are only objects."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.core.clock import SystemClock
from tandem.core.cluster_status import ClusterChange, ProcessState, ProcessStatus
from tandem.core.config import WorkerConfig
from tandem.core.errors import CheckpointError, InternalError, UnavailableError
from tandem.core.instance_section import InstanceSection
from tandem.deploy.controller import Controller
from tandem.deploy.running_process import RunningProcess
from tandem.deploy.supervisor import Backoff, Event, Failed, Loading, Stopped, Up
from tandem.deploy.topology import ProcessRole, ProcessSpec
from tests.deploy.fake_launcher import FakeLauncher, FakeProcess

FAST = Backoff(first_s=0.001, longest_s=0.004, healthy_after_s=60.0)


def spec(index: int, role: ProcessRole = ProcessRole.PREFILL) -> ProcessSpec:
    return ProcessSpec(role, index, "none:None", WorkerConfig(model=Path("/m")), threads=1)


@pytest.fixture
def launcher() -> FakeLauncher:
    return FakeLauncher()


@pytest.fixture
async def controller(launcher: FakeLauncher) -> AsyncIterator[Controller]:
    controller = Controller(launcher, SystemClock(), FAST)
    yield controller
    await controller.kill()


def pids(controller: Controller) -> list[int]:
    return [info.pid for info in controller.running()]


async def events_until(controller: Controller, kind: type[Event], pid: int | None = None) -> list[Event]:
    """What happened up to the first event of that kind, and of that process if one is named."""
    events: list[Event] = []
    async with asyncio.timeout(5):
        while True:
            event = await controller.events.get()
            events.append(event)
            if isinstance(event, kind) and (pid is None or (isinstance(event, Up) and event.info.pid == pid)):
                return events


async def test_starts_what_is_desired(controller: Controller, launcher: FakeLauncher) -> None:
    await controller.reconcile([spec(0), spec(1)], 1.0)
    assert [info.name for info in controller.running()] == ["prefill-0", "prefill-1"]
    await controller.reconcile([spec(0), spec(1)], 1.0)
    assert len(launcher.launched) == 2, "what runs is left alone"


async def test_a_dead_process_is_replaced_by_a_new_instance(controller: Controller, launcher: FakeLauncher) -> None:
    await controller.reconcile([spec(0), spec(1)], 1.0)
    launcher.launched[0].died.set_result("its process died")
    events = await events_until(controller, Up, pid=102)
    assert pids(controller) == [102, 101]
    assert launcher.launched[0].killed, "what the dead one held is given back"
    assert launcher.launched[0].graces == []
    ids = [process.info.instance_id for process in launcher.launched]
    assert len(set(ids)) == 3
    assert [type(event) for event in events] == [Loading, Loading, Up, Up, Failed, Loading, Up]
    assert events[4] == Failed("prefill-0", "its process died", FAST.first_s, failures=1)


async def test_the_delay_doubles_up_to_a_limit(controller: Controller, launcher: FakeLauncher) -> None:
    await controller.reconcile([spec(0)], 1.0)
    launcher.errors.extend([UnavailableError("no")] * 4)
    launcher.launched[0].died.set_result("its process died")
    events = await events_until(controller, Up, pid=101)
    delays = [event.retry_s for event in events if isinstance(event, Failed)]
    assert delays == [0.001, 0.002, 0.004, 0.004, 0.004]
    failures = [event.failures for event in events if isinstance(event, Failed)]
    assert failures == [1, 2, 3, 4, 5], "it is said that it fails again and again"


async def test_the_first_failure_is_raised_and_tried_again(controller: Controller, launcher: FakeLauncher) -> None:
    launcher.errors.append(CheckpointError("the checkpoint has no config.json"))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        await controller.reconcile([spec(0)], 1.0)
    await events_until(controller, Up, pid=100)


@pytest.mark.parametrize("error", [ValueError("cannot create a placement group"), RuntimeError("a fault"), OSError(28)])
async def test_an_error_of_any_kind_is_reported_and_tried_again(
    controller: Controller, launcher: FakeLauncher, error: Exception
) -> None:
    await controller.reconcile([spec(0)], 1.0)
    launcher.errors.append(error)
    launcher.launched[0].died.set_result("its process died")
    events = await events_until(controller, Up, pid=101)
    reasons = [event.reason for event in events if isinstance(event, Failed)]
    assert reasons[1] == f"prefill-0 could not be supervised ({type(error).__name__}: {error})"


async def test_a_first_start_with_an_error_of_any_kind_is_raised(
    controller: Controller, launcher: FakeLauncher
) -> None:
    launcher.errors.append(ValueError("a placement group with no bundle"))
    with pytest.raises(InternalError, match=r"prefill-0 could not be supervised \(ValueError: a placement group"):
        await controller.reconcile([spec(0)], 1.0)
    await events_until(controller, Up, pid=100)


async def test_where_there_is_room_a_successor_is_up_before_a_process_stops(launcher: FakeLauncher) -> None:
    controller = Controller(launcher, SystemClock(), FAST, starts_first=lambda spec: spec.index == 0)
    await controller.reconcile([spec(0), spec(1)], 1.0)
    changed = [replace(spec(index), threads=2) for index in range(2)]
    launcher.errors.append(CheckpointError("the image has no model"))
    with pytest.raises(CheckpointError):
        await controller.reconcile(changed, 1.0)
    assert sorted(pids(controller)) == [100, 101], "what runs goes on, and nothing else is replaced"
    assert launcher.stop_order == []
    first = launcher.launched[0]
    first.may_stop.clear()
    replacing = asyncio.create_task(controller.reconcile(changed, 3.0))
    async with asyncio.timeout(5):
        while not first.graces:  # noqa: ASYNC110 - of an object that tells nobody
            await asyncio.sleep(0.001)
    assert {status.pid for status in controller.status()} == {100, 101, 102}, "both run"
    first.may_stop.set()
    assert await replacing == ClusterChange(replaced=("prefill-0", "prefill-1"))
    assert sorted(pids(controller)) == [102, 103]
    assert launcher.stop_order == ["prefill-0", "prefill-1"]
    await controller.kill()


async def test_a_process_that_makes_no_progress_is_killed_and_replaced(launcher: FakeLauncher) -> None:
    async def watch(_: ProcessSpec, process: RunningProcess) -> str:
        assert isinstance(process, FakeProcess)
        return await process.stalled

    controller = Controller(launcher, SystemClock(), FAST, watch=watch)
    await controller.reconcile([spec(0), spec(1)], 1.0)
    launcher.launched[1].stalled.set_result("it is stopped")
    events = await events_until(controller, Up, pid=102)
    assert Failed("prefill-1", "it is stopped", FAST.first_s) in events
    assert launcher.launched[1].killed
    assert launcher.launched[1].graces == [], "it could not drain"
    assert pids(controller) == [100, 102]
    await controller.kill()


async def test_leaving_on_request_is_no_failure(controller: Controller, launcher: FakeLauncher) -> None:
    await controller.reconcile([spec(0)], 1.0)
    for number in range(3):
        launcher.launched[number].was_asked = True
        launcher.launched[number].died.set_result("it got a SIGTERM and has left")
        events = await events_until(controller, Up, pid=101 + number)
        assert Failed("prefill-0", "it got a SIGTERM and has left", FAST.first_s, failures=0) in events


async def test_what_is_not_desired_leaves_with_grace(controller: Controller, launcher: FakeLauncher) -> None:
    await controller.reconcile([spec(0), spec(1)], 1.0)
    await controller.reconcile([spec(1), spec(2)], 7.0)
    assert [info.name for info in controller.running()] == ["prefill-1", "prefill-2"]
    assert launcher.launched[0].graces == [7.0]
    assert launcher.launched[0].killed
    assert launcher.launched[1].graces == []


def with_queue(index: int, max_queue: int) -> ProcessSpec:
    instance = InstanceSection(max_queue=max_queue)
    return replace(spec(index), config=WorkerConfig(model=Path("/m"), instance=instance))


async def test_what_has_other_settings_is_replaced_one_by_one(controller: Controller, launcher: FakeLauncher) -> None:
    await controller.reconcile([spec(0), spec(1), spec(2)], 1.0)
    change = await controller.reconcile([spec(0), with_queue(1, 7), with_queue(2, 7), spec(3)], 5.0)
    assert change == ClusterChange(started=("prefill-3",), replaced=("prefill-1", "prefill-2"))
    assert [process.graces for process in launcher.launched[:3]] == [[], [5.0], [5.0]]
    order = [event for event in await events_until(controller, Up, pid=105) if isinstance(event, (Stopped, Loading))]
    assert order[-4:] == [Stopped("prefill-1"), Loading("prefill-1"), Stopped("prefill-2"), Loading("prefill-2")]


async def test_settings_that_do_not_work_stop_at_the_first_process(
    controller: Controller, launcher: FakeLauncher
) -> None:
    await controller.reconcile([spec(0), spec(1)], 1.0)
    launcher.errors.append(CheckpointError("too little memory"))
    with pytest.raises(CheckpointError):
        await controller.reconcile([with_queue(0, 7), with_queue(1, 7)], 1.0)
    assert not launcher.launched[1].killed
    await controller.reconcile([spec(0), spec(1)], 1.0)  # back again, whatever the failed one does meanwhile
    assert [status.state for status in controller.status()] == [ProcessState.UP, ProcessState.UP]


async def test_role_and_routers_need_no_other_process(controller: Controller, launcher: FakeLauncher) -> None:
    await controller.reconcile([spec(0)], 1.0)
    other = WorkerConfig(model=Path("/m"), role="decode", routers=("10.0.0.1:1",))
    await controller.reconcile([replace(spec(0), config=other)], 1.0)
    assert len(launcher.launched) == 1
    ((now, _),) = controller.running_instances()
    assert now.config == other, "it is started again with these"


async def test_status_says_what_is_wrong(launcher: FakeLauncher) -> None:
    controller = Controller(launcher, SystemClock(), Backoff(first_s=3600.0))
    await controller.reconcile([spec(0), spec(1)], 1.0)
    launcher.launched[0].died.set_result("its process died")
    await events_until(controller, Failed)
    first, second = controller.status()
    assert first == ProcessStatus("prefill-0", "colocated", ProcessState.WAITING, failures=1, note="its process died")
    assert (second.state, second.pid, second.instance_id) == (ProcessState.UP, 101, "prefill-1-101")
    await controller.kill()


async def test_stop_lets_routers_finish_first(controller: Controller, launcher: FakeLauncher) -> None:
    await controller.reconcile([spec(0), spec(0, ProcessRole.DECODE), spec(0, ProcessRole.ROUTER)], 1.0)
    await controller.stop(3.0)
    assert launcher.stop_order[0] == "router-0"
    assert sorted(launcher.stop_order[1:]) == ["decode-0", "prefill-0"]
    assert all(process.killed and process.graces == [3.0] for process in launcher.launched)
    assert controller.running() == ()
    assert isinstance([controller.events.get_nowait() for _ in range(controller.events.qsize())][-1], Stopped)


async def test_a_stop_goes_on_when_nobody_waits_for_it(controller: Controller, launcher: FakeLauncher) -> None:
    """As at Ctrl-C while a cluster becomes smaller: what leaves finishes its requests, the others get their time."""
    await controller.reconcile([spec(0), spec(1)], 1.0)
    stays, leaves = launcher.launched
    leaves.may_stop.clear()
    smaller = asyncio.create_task(controller.reconcile([spec(0)], 1.0))
    await asyncio.sleep(0.01)
    smaller.cancel()
    await asyncio.gather(smaller, return_exceptions=True)
    assert not leaves.killed
    stopping = asyncio.create_task(controller.stop(2.0))
    await asyncio.sleep(0.01)
    assert not stopping.done()
    leaves.may_stop.set()
    await stopping
    assert (stays.graces, leaves.graces) == ([2.0], [1.0])


async def test_stop_abandons_what_is_loading(controller: Controller, launcher: FakeLauncher) -> None:
    launcher.hold = True
    starting = asyncio.create_task(controller.reconcile([spec(0)], 1.0))
    await asyncio.sleep(0.01)
    await controller.stop(1.0)
    assert launcher.abandoned == 1
    with pytest.raises(asyncio.CancelledError):
        await starting


async def test_stop_does_not_wait_for_a_retry(launcher: FakeLauncher) -> None:
    controller = Controller(launcher, SystemClock(), Backoff(first_s=3600.0))
    await controller.reconcile([spec(0)], 1.0)
    launcher.launched[0].died.set_result("its process died")
    await events_until(controller, Failed)
    async with asyncio.timeout(5):
        await controller.stop(1.0)


async def test_kill_does_not_wait_for_a_stop_that_hangs(controller: Controller, launcher: FakeLauncher) -> None:
    await controller.reconcile([spec(0)], 1.0)
    launcher.launched[0].may_stop.clear()
    stopping = asyncio.create_task(controller.stop(1.0))
    await asyncio.sleep(0.01)
    stopping.cancel()
    async with asyncio.timeout(5):
        await controller.kill()
    assert launcher.launched[0].killed

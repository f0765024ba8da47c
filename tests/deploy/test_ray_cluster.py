"""Ray itself: real actors, real deaths. Ray is started once, in a child process of this test run's own."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tandem.core.clock import SystemClock
from tandem.core.config import WorkerConfig
from tandem.core.errors import CheckpointError, InternalError, UnavailableError
from tandem.deploy.controller import Backoff, Controller, Failed, Up
from tandem.deploy.ray_cluster import LocalRay, RayLauncher
from tandem.deploy.topology import ProcessRole, ProcessSpec

pytestmark = pytest.mark.timeout(240)


def spec(index: int, model_name: str = "fine", gpus: float = 0.0) -> ProcessSpec:
    config = WorkerConfig(model=Path("/m"), model_name=model_name)
    return ProcessSpec(ProcessRole.PREFILL, index, "tests.deploy.fake_app:FakeApp", config, threads=3, gpus=gpus)


@pytest.fixture(scope="module")
def ray_pids() -> Iterator[set[int]]:
    """A local Ray, and the pids it began with. Afterwards none of its processes and files may be left."""
    before = dict(os.environ)
    ray, own = LocalRay(), psutil.Process()
    others = set(own.children(recursive=True))  # of other tests
    ray.start(processes=3, gpus=0)
    try:
        assert ray.folder.stat().st_mode & 0o777 == 0o700, "the token and the sockets are for this user alone"
        yield {child.pid for child in own.children(recursive=True) if child not in others}
    finally:
        children = [child for child in own.children(recursive=True) if child not in others]
        ray.stop()
        os.environ.clear()
        os.environ.update(before)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == [], "no process may be left"
    assert not ray.folder.exists()


def test_ray_listens_on_loopback_only(ray_pids: set[int]) -> None:
    listening = [
        connection.laddr
        for pid in ray_pids | {os.getpid()}
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert {address.ip.removeprefix("::ffff:") for address in listening if address} <= {"127.0.0.1", "::1"}


async def test_a_killed_process_is_started_again(ray_pids: set[int], tmp_path: Path) -> None:
    controller = Controller(RayLauncher(tmp_path), SystemClock(), Backoff(first_s=0.01))
    await controller.reconcile([spec(0), spec(1)], 1.0)
    before = controller.running()
    os.kill(before[0].pid, signal.SIGKILL)
    restarted = await _next_up(controller, after=Failed)
    assert restarted.info.name == before[0].name
    assert restarted.info.pid != before[0].pid
    assert restarted.info.instance_id != before[0].instance_id
    assert controller.running()[1] == before[1], "the other one has not noticed"

    await controller.stop(5.0)
    assert controller.running() == ()
    log = (tmp_path / "prefill-0.log").read_text()
    assert log == "starting fine\nthreads 3\nstarting fine\nthreads 3\ndraining for 5.0\n"
    _, alive = await asyncio.to_thread(_wait_gone, [restarted.info.pid, before[1].pid])
    assert alive == []


async def test_errors_of_the_application_arrive_as_they_are(ray_pids: set[int], tmp_path: Path) -> None:
    launcher = RayLauncher(tmp_path)
    with pytest.raises(CheckpointError, match=r"^the checkpoint has no config\.json$"):
        await launcher.launch(spec(0, "broken"))
    with pytest.raises(InternalError, match=r"could not start \(KeyError: .*its log is .*prefill-1\.log"):
        await launcher.launch(spec(1, "buggy"))
    assert "KeyError" in (tmp_path / "prefill-1.log").read_text()
    with pytest.raises(UnavailableError, match=r"prefill-2 died while it started; its log is"):
        await launcher.launch(spec(2, "deadly"))


async def test_an_abandoned_launch_leaves_no_process(ray_pids: set[int], tmp_path: Path) -> None:
    launching = asyncio.create_task(RayLauncher(tmp_path).launch(spec(0, "slow")))
    log = tmp_path / "prefill-0.log"
    async with asyncio.timeout(60):
        while not (log.exists() and "pid" in log.read_text()):  # noqa: ASYNC110 - a file tells no event
            await asyncio.sleep(0.02)
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching
    pid = int(log.read_text().split("pid ")[1])
    _, alive = await asyncio.to_thread(_wait_gone, [pid])
    assert alive == []


async def _next_up(controller: Controller, after: type[Failed]) -> Up:
    failed = False
    async with asyncio.timeout(60):
        while True:
            event = await controller.events.get()
            failed |= isinstance(event, after)
            if failed and isinstance(event, Up):
                return event


def _wait_gone(pids: list[int]) -> tuple[list[psutil.Process], list[psutil.Process]]:
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return psutil.wait_procs(processes, timeout=20)

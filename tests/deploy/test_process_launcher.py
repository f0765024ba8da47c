"""Plain processes that end with their controller, and others that the next controller takes back."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tandem.core.clock import SystemClock
from tandem.core.config import WorkerConfig
from tandem.core.errors import CheckpointError, UnavailableError
from tandem.deploy.controller import Controller
from tandem.deploy.device_shares import DeviceShares
from tandem.deploy.process_identity import ProcessIdentity
from tandem.deploy.process_launcher import ProcessLauncher
from tandem.deploy.process_records import ProcessRecords
from tandem.deploy.supervisor import Backoff, Failed, Up
from tandem.deploy.topology import ProcessRole, ProcessSpec

pytestmark = pytest.mark.timeout(120)

# The processes of a controller find the application of the tests.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
CONTROLLER = """
import asyncio, sys
from pathlib import Path
from tests.deploy.test_process_launcher import make_launcher, spec

async def main():
    launcher = make_launcher(Path(sys.argv[1]))
    await launcher.start()
    for number, name in enumerate(sys.argv[2:]):
        print((await launcher.launch(spec(number, name))).info.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def spec(index: int, model_name: str = "fine") -> ProcessSpec:
    config = WorkerConfig(model=Path("/m"), model_name=model_name)
    return ProcessSpec(ProcessRole.PREFILL, index, "tests.deploy.fake_app:FakeApp", config, threads=3)


def make_launcher(folder: Path) -> ProcessLauncher:
    records = folder / "processes"
    records.mkdir(exist_ok=True)
    return ProcessLauncher(folder, folder, load_timeout_s=60.0, grace_s=1.0, records=ProcessRecords(records))


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short path, as that of a socket must be. Processes that nobody takes back end with it."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield Path(folder)


@contextmanager
def earlier_controller(folder: Path, *names: str) -> Iterator[list[int]]:
    """Pids of the processes that a controller in a process of its own has started; it is killed at the end."""
    command = [sys.executable, "-c", CONTROLLER, str(folder), *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as controller:
        assert controller.stdout is not None
        try:
            yield [int(controller.stdout.readline()) for _ in names]
        finally:
            controller.kill()


def has_ended(pid: int) -> bool:
    until_s = time.monotonic() + 30
    while ProcessIdentity.of(pid) is not None:
        if time.monotonic() > until_s:
            return False
        time.sleep(0.02)
    return True


async def test_a_process_lives_as_long_as_its_launcher(folder: Path) -> None:
    launcher = ProcessLauncher(folder / "run", folder)
    await launcher.start()
    process = await launcher.launch(spec(0))
    assert psutil.Process(process.info.pid).ppid() == os.getpid()
    with pytest.raises(CheckpointError, match=r"^the checkpoint has no config\.json$"):
        await launcher.launch(spec(1, "broken"))
    await process.stop(2.0)
    await process.kill()
    await launcher.close()
    assert "draining for 2.0" in (folder / "prefill-0.log").read_text()
    assert not (folder / "run").exists()


async def test_the_next_controller_takes_processes_back(folder: Path) -> None:
    """The same processes, supervised as before: one is killed and replaced, both are stopped."""
    with earlier_controller(folder, "fine", "fine") as before:
        pass
    assert all(psutil.pid_exists(pid) for pid in before)
    launcher = make_launcher(folder)
    await launcher.start()
    controller = Controller(launcher, SystemClock(), Backoff(first_s=0.01))
    controller.take_back(launcher.left_running())
    await controller.reconcile([spec(0), spec(1)], 1.0)
    assert [info.pid for info in controller.running()] == before
    os.kill(before[0], signal.SIGKILL)
    failed = restarted = None
    async with asyncio.timeout(60):
        while restarted is None:
            event = await controller.events.get()
            failed = event if isinstance(event, Failed) else failed
            restarted = event if failed is not None and isinstance(event, Up) else None
    assert failed is not None
    assert failed.reason.startswith("its process died (")
    assert restarted.info.pid not in before
    await controller.stop(1.0)
    await launcher.close()
    assert await asyncio.to_thread(has_ended, before[1])
    assert list((folder / "processes").iterdir()) == []


@pytest.mark.slow
async def test_a_stopped_process_is_not_taken_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.deploy.process_launcher._RETURN_S", 1.0)
    with earlier_controller(folder, "fine") as (before,):
        os.kill(before, signal.SIGSTOP)
    launcher = make_launcher(folder)
    await launcher.start()
    process = await launcher.launch(spec(0))
    assert process.info.pid != before
    assert await asyncio.to_thread(has_ended, before), "it would have kept its memory and its devices"
    await process.kill()
    await launcher.close()


async def test_a_process_with_the_pid_of_another_is_left_alone(folder: Path) -> None:
    """The record says when the process was started; the pid alone could now be anybody's."""
    with earlier_controller(folder, "fine") as (before,):
        pass
    record_file = folder / "processes" / "prefill-0.json"
    with subprocess.Popen(["sleep", "100"]) as unrelated:  # noqa: ASYNC220 - it takes no time
        record_file.write_text(record_file.read_text().replace(f'"pid": {before}', f'"pid": {unrelated.pid}'))
        launcher = make_launcher(folder)
        await launcher.start()
        assert launcher.left_running() == []
        assert await asyncio.to_thread(has_ended, before), "no record names it, so the launcher tells it to end"
        assert unrelated.poll() is None
        unrelated.kill()
    await launcher.close()


@pytest.mark.slow
def test_processes_end_when_the_folder_is_gone() -> None:
    with tempfile.TemporaryDirectory(prefix="t") as name:
        with earlier_controller(Path(name), "fine") as (pid,):
            pass
        assert ProcessIdentity.of(pid) is not None
    assert has_ended(pid)


@pytest.mark.slow
def test_a_process_that_is_not_ready_ends_with_its_controller(folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", CONTROLLER, str(folder), "slow"], env=ENVIRONMENT) as controller:
        log, until_s = folder / "prefill-0.log", time.monotonic() + 60
        while not (log.exists() and "pid" in log.read_text()):
            assert time.monotonic() < until_s
            time.sleep(0.02)
        controller.kill()
    assert has_ended(int(log.read_text().split("pid ")[1]))


def test_devices_are_divided() -> None:
    shares = DeviceShares(2)
    assert shares.take("a", 0.0) == []
    assert shares.take("b", 0.5) == ["0"]
    assert shares.take("c", 1.0) == ["1"]
    assert shares.take("d", 0.5) == ["0"]
    with pytest.raises(UnavailableError, match="1 GPUs are needed, and 0 are free"):
        shares.take("e", 1.0)
    shares.give_back("b")
    shares.give_back("d")
    shares.give_back("unknown")
    assert shares.take("e", 1.0) == ["0"]
    assert DeviceShares(2, "7,GPU-5").take("f", 2.0) == ["7", "GPU-5"]

"""Ray itself: real processes, real deaths. Ray is started once, in a child process of this test run's own."""

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from tandem.core.clock import SystemClock
from tandem.core.config import WorkerConfig
from tandem.core.errors import CheckpointError, InternalError, UnavailableError
from tandem.deploy.controller import Controller
from tandem.deploy.progress import watch_health
from tandem.deploy.ray_launcher import RayLauncher
from tandem.deploy.running_process import ProcessEnd
from tandem.deploy.supervisor import Backoff, Failed, Up
from tandem.deploy.topology import ProcessRole, ProcessSpec

pytestmark = [pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]


def spec(index: int, model_name: str = "fine", gpus: float = 0.0) -> ProcessSpec:
    config = WorkerConfig(model=Path("/m"), model_name=model_name)
    return ProcessSpec(ProcessRole.PREFILL, index, "tests.deploy.fake_app:FakeApp", config, threads=3, gpus=gpus)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def launcher(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RayLauncher]:
    """With a local Ray. Afterwards none of its processes and files may be left."""
    folder = Path(tempfile.gettempdir()) / f"tandem-test-{os.getpid()}"
    launcher = RayLauncher(folder, tmp_path_factory.mktemp("logs"), SystemClock(), gpus=2, load_timeout_s=60.0)
    own = psutil.Process()
    others = set(own.children(recursive=True))  # of other tests
    try:
        await launcher.start()
        assert folder.stat().st_mode & 0o777 == 0o700, "the token and the sockets are for this user alone"
        yield launcher
    finally:
        children = [child for child in own.children(recursive=True) if child not in others]
        await launcher.close()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == [], "no process may be left"
    assert not folder.exists()


@pytest.fixture
def logs(launcher: RayLauncher) -> Path:
    """Empty for each test."""
    for log in launcher.log_folder.iterdir():
        log.unlink()
    return launcher.log_folder


async def test_ray_listens_on_loopback_only(launcher: RayLauncher) -> None:
    pids = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    listening = [
        connection.laddr
        for connection in psutil.net_connections("tcp")
        if connection.pid in pids and connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert {address.ip.removeprefix("::ffff:") for address in listening if address} <= {"127.0.0.1", "::1"}


async def test_a_process_is_no_rays(launcher: RayLauncher, logs: Path) -> None:
    """It is this process's child, of normal priority; it is not the first that the kernel ends."""
    process = await launcher.launch(spec(0))
    try:
        of_kernel = psutil.Process(process.info.pid)
        assert of_kernel.ppid() == os.getpid()
        assert of_kernel.nice() == psutil.Process().nice()
        assert _oom_score(process.info.pid) == _oom_score(os.getpid())
    finally:
        await process.kill()
    assert not psutil.pid_exists(process.info.pid), "it leaves no zombie"


async def test_a_killed_process_is_started_again(launcher: RayLauncher, logs: Path) -> None:
    controller = Controller(launcher, SystemClock(), Backoff(first_s=0.01))
    await controller.reconcile([spec(0), spec(1)], 1.0)
    before = controller.running()
    os.kill(before[0].pid, signal.SIGKILL)
    failed, restarted = await _next_up(controller)
    assert failed.reason == f"its process died (SIGKILL); its log is {logs / 'prefill-0.log'}"
    assert restarted.info.name == before[0].name
    assert restarted.info.pid != before[0].pid
    assert restarted.info.instance_id != before[0].instance_id
    assert controller.running()[1] == before[1], "the other one has not noticed"

    await controller.stop(5.0)
    assert controller.running() == ()
    log = (logs / "prefill-0.log").read_text()
    assert log == "starting fine\nthreads 3\nstarting fine\nthreads 3\ndraining for 5.0\n"
    assert not any(psutil.pid_exists(pid) for pid in (restarted.info.pid, before[1].pid))


async def test_a_stopped_process_is_replaced(launcher: RayLauncher, logs: Path) -> None:
    clock = SystemClock()
    controller = Controller(launcher, clock, Backoff(first_s=0.01), watch=watch_health(clock))
    await controller.reconcile([replace(spec(0), entry="tests.deploy.fake_app:HealthyApp")], 1.0)
    (before,) = controller.running()
    os.kill(before.pid, signal.SIGSTOP)
    failed, restarted = await _next_up(controller)
    assert failed.reason.startswith("it is stopped, as by SIGSTOP")
    assert restarted.info.pid != before.pid
    assert not psutil.pid_exists(before.pid), "a kill ends a stopped process, too"
    await controller.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reason"), [("hanging", "computes nothing"), ("ill", "it has reported for 5")])
async def test_a_process_without_progress_is_replaced(
    launcher: RayLauncher, logs: Path, name: str, reason: str
) -> None:
    clock = SystemClock()
    controller = Controller(launcher, clock, Backoff(first_s=0.01), watch=watch_health(clock))
    await controller.reconcile([replace(spec(0, name), entry="tests.deploy.fake_app:HealthyApp")], 1.0)
    (before,) = controller.running()
    failed, _ = await _next_up(controller)
    assert reason in failed.reason
    assert not psutil.pid_exists(before.pid)
    await controller.kill()


async def test_a_terminated_process_drains_and_is_replaced(launcher: RayLauncher, logs: Path) -> None:
    controller = Controller(launcher, SystemClock(), Backoff(first_s=0.01))
    await controller.reconcile([spec(0)], 1.0)
    os.kill(controller.running()[0].pid, signal.SIGTERM)
    failed, _ = await _next_up(controller)
    assert failed == Failed("prefill-0", "it got a SIGTERM and has left", 0.01, failures=0)
    assert "draining for 10.0" in (logs / "prefill-0.log").read_text()
    await controller.kill()


async def test_a_drain_that_hangs_is_given_up(
    launcher: RayLauncher, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks a draining process for its health."""
    monkeypatch.setattr(launcher, "_grace_s", -7.5)  # with the margin to close: half a second
    process = await launcher.launch(spec(0, "undying"))
    os.kill(process.info.pid, signal.SIGTERM)
    end = await process.wait_closed()
    assert end == ProcessEnd("it got a SIGTERM and has not ended within 0.5 s")
    await process.kill()


async def test_errors_of_the_application_arrive_as_they_are(launcher: RayLauncher, logs: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^the checkpoint has no config\.json$"):
        await launcher.launch(spec(0, "broken"))
    with pytest.raises(InternalError, match=r"could not start \(KeyError: .*its log is .*prefill-1\.log"):
        await launcher.launch(spec(1, "buggy"))
    assert "KeyError" in (logs / "prefill-1.log").read_text()
    with pytest.raises(UnavailableError, match=r"prefill-2 died while it started \(exit status 3\); its log is"):
        await launcher.launch(spec(2, "deadly"))


async def test_an_abandoned_launch_leaves_no_process(launcher: RayLauncher, logs: Path) -> None:
    launching = asyncio.create_task(launcher.launch(spec(0, "slow")))
    pid = await _slow_pid(logs)
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching
    assert not psutil.pid_exists(pid)


async def test_a_load_that_hangs_is_given_up(
    launcher: RayLauncher, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_load_timeout_s", 1.0)
    with pytest.raises(UnavailableError, match=r"^prefill-0 was not ready within 1 s \(load_timeout_s\); its log is"):
        await launcher.launch(spec(0, "slow"))
    running = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert not [child for child in running if "tandem.deploy.hosted_process" in child.cmdline()]


async def test_a_long_log_is_cut(launcher: RayLauncher, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_max_log_bytes", 100)
    with (logs / "decode-0.log").open("a") as log:  # as a process writes it
        print("x" * 200, file=log, flush=True)
        launcher.shorten_logs()
        print("and on", file=log, flush=True)
    assert (logs / "decode-0.log").read_text() == "and on\n"
    assert (logs / "decode-0.log.1").read_text() == "x" * 200 + "\n"


@pytest.mark.parametrize("server", ["gcs_server", pytest.param("raylet", marks=pytest.mark.slow)])
async def test_processes_outlive_ray(launcher: RayLauncher, logs: Path, server: str) -> None:
    notes: list[str] = []
    keeping = asyncio.create_task(launcher.keep_ray(notes.append))
    controller = Controller(launcher, SystemClock(), Backoff(first_s=0.01))
    await controller.reconcile([spec(0), spec(1, "on-gpu", 1.0)], 1.0)
    before = controller.running()
    (victim,) = [c for c in psutil.Process().children(recursive=True) if c.name() == server]
    victim.kill()
    async with asyncio.timeout(20):
        while not notes:  # noqa: ASYNC110 - a list tells no event
            await asyncio.sleep(0.02)
    os.kill(before[0].pid, signal.SIGKILL)  # while there is no Ray
    failed, restarted = await _next_up(controller)
    assert failed.reason.startswith("its process died (SIGKILL)")
    assert restarted.info.pid != before[0].pid
    assert controller.running()[1] == before[1]
    assert notes[0] == f"Ray: its {server} died; starting it again, while all processes go on"
    assert notes[1].startswith("Ray: up again in ")
    assert not psutil.pid_exists(victim.pid), "the old Ray is gone, without zombies"
    await controller.reconcile([spec(0), spec(1, "on-gpu", 1.0), spec(2, "on-gpu", 1.0)], 1.0)
    devices = [(logs / f"prefill-{number}.log").read_text().split("devices ")[1] for number in (1, 2)]
    assert devices == ["0\n", "1\n"], "the new Ray knows which one is taken"
    await controller.kill()
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


def _oom_score(pid: int) -> str:
    return Path(f"/proc/{pid}/oom_score_adj").read_text()


async def _slow_pid(logs: Path) -> int:
    log = logs / "prefill-0.log"
    async with asyncio.timeout(60):
        while not (log.exists() and "pid" in log.read_text()):  # noqa: ASYNC110 - a file tells no event
            await asyncio.sleep(0.02)
    return int(log.read_text().split("pid ")[1])


async def _next_up(controller: Controller) -> tuple[Failed, Up]:
    """The next failure, and the start after it."""
    failed = None
    async with asyncio.timeout(100):
        while True:
            event = await controller.events.get()
            failed = event if isinstance(event, Failed) else failed
            if failed is not None and isinstance(event, Up):
                return failed, event

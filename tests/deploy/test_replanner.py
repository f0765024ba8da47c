"""The replanner with a fake planner, and the planner process with small scripts."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from tandem.core.clock import ManualClock
from tandem.core.errors import InternalError, UnavailableError
from tandem.core.plan import Plan
from tandem.core.replanning import DriftState, ReplanStatus
from tandem.core.slo_file import SloFile
from tandem.core.workload_profile import ProfileSnapshot
from tandem.deploy.planner_process import plan_in_process, write_result
from tandem.deploy.replanner import Replanner, ReplanResult, RunPlanner

WINDOW_S = 300.0
RESULT = ReplanResult("Colocate.", ("colocated tp1 on cpu: 1 -> 2",), gain=0.25, regains=False, attainment=0.7)
SLO_FILE = SloFile.model_validate(
    {
        "model": "tiny",
        "cluster": {"nodes": [{"device": "cpu"}]},
        "slo": [{"ttft_s": 1, "tpot_s": 0.1}],
        "workload": {"prompt_tokens": {"mean": 100, "cv": 0}, "output_tokens": {"mean": 20, "cv": 0}, "rate": 2.0},
        "search": {"requests": 200},
    }
)
PLAN = Plan.model_validate(
    {
        "model": "tiny",
        "verdict": "colocate",
        "groups": [{"role": "colocated", "instances": 1, "device": "cpu", "kv_tokens": 9}],
    }
)


def window(prompt_tokens: int) -> ProfileSnapshot:
    arrival_s = tuple(0.5 * i for i in range(600))
    same = [(value,) * 600 for value in (prompt_tokens, 20, 0, 0)]
    return ProfileSnapshot(0, WINDOW_S, 600, 1.0, 600, arrival_s, *same)


@dataclass
class FakePlanner:
    results: list[ReplanResult | UnavailableError] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    cancelled: bool = False

    async def __call__(self, folder: Path) -> ReplanResult:
        self.folders.append(folder)
        try:
            while not self.results:  # noqa: ASYNC110 - a planner that takes its time
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        result = self.results.pop(0)
        if isinstance(result, UnavailableError):
            raise result
        return result


class Watch:
    """A replanner with its fakes."""

    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self.planner = FakePlanner()
        self.published: list[ReplanStatus] = []
        self.told: list[str] = []
        self.closed_window: ProfileSnapshot | None = None
        self.router_is_down = False
        self.replanner = Replanner(
            PLAN,
            SLO_FILE,
            self._profile,
            self._publish,
            run_planner=self.planner,
            clock=self.clock,
            folder=folder,
            notify=self.told.append,
            poll_s=0.001,
        )

    async def _profile(self) -> ProfileSnapshot | None:
        if self.router_is_down:
            raise UnavailableError("the router cannot be reached")
        return self.closed_window

    async def _publish(self, status: ReplanStatus) -> None:
        self.published.append(status)

    async def see(self, prompt_tokens: int, windows: int = 1) -> None:
        for _ in range(windows):
            self.clock.advance(WINDOW_S)
            number = 0 if self.closed_window is None else self.closed_window.window + 1
            self.closed_window = replace(window(prompt_tokens), window=number)
            await self.replanner.poll()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not is_so():
                await asyncio.sleep(0.001)
                await self.replanner.poll()

    @property
    def state(self) -> DriftState:
        return self.replanner.status.state


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch(tmp_path)


async def test_a_window_is_evaluated_once(watch: Watch) -> None:
    await watch.see(900)
    for _ in range(10):
        await watch.replanner.poll()
    assert watch.state is DriftState.SUSPECT
    assert len(watch.published) == 11, "told at every look, for a router that was started again"


async def test_a_better_plan_is_proposed_and_published(watch: Watch, tmp_path: Path) -> None:
    await watch.see(900, windows=3)
    assert watch.state is DriftState.REPLANNING
    watch.planner.results = [RESULT]
    await watch.until(lambda: watch.state is DriftState.PROPOSED)
    status = watch.published[-1]
    assert status.proposal is not None
    assert (status.proposal.gain, status.proposal.changes) == (0.25, RESULT.changes)
    assert status.drift == pytest.approx(4.0)
    assert "+25%" in status.note
    assert "70%" in status.note
    folder = tmp_path / "replan-1"
    assert watch.planner.folders == [folder]
    assert status.proposal.folder == str(folder)
    assert {path.name for path in folder.iterdir()} == {"slo.yaml", "workload.csv", "running_plan.yaml"}


async def test_a_proposal_is_withdrawn_when_the_drift_ends(watch: Watch) -> None:
    watch.planner.results = [RESULT]
    await watch.see(900, windows=3)
    await watch.until(lambda: watch.state is DriftState.PROPOSED)
    await watch.see(100, windows=6)
    assert watch.state is DriftState.COOLING
    assert watch.published[-1].proposal is None
    assert "withdrawn" in watch.published[-1].note
    assert [note.split(" ")[0] for note in watch.told] == ["the", "another", "the"], "each event is told once"


@pytest.mark.parametrize("gain", [0.02, -0.5])
async def test_a_small_gain_is_reported_and_not_proposed(watch: Watch, gain: float) -> None:
    watch.planner.results = [replace(RESULT, gain=gain)]
    await watch.see(900, windows=3)
    await watch.until(lambda: watch.state is DriftState.COOLING)
    assert watch.published[-1].proposal is None
    assert "gains only" in watch.replanner.status.note


async def test_a_plan_that_regains_targets_is_proposed_for_a_small_gain(watch: Watch) -> None:
    watch.planner.results = [replace(RESULT, gain=0.02, regains=True)]
    await watch.see(900, windows=3)
    await watch.until(lambda: watch.state is DriftState.PROPOSED)


async def test_a_failed_planner_is_reported(watch: Watch) -> None:
    watch.planner.results = [UnavailableError("the planner ended with status 1")]
    await watch.see(900, windows=3)
    await watch.until(lambda: watch.state is DriftState.COOLING)
    assert "status 1" in watch.replanner.status.note


async def test_a_folder_that_cannot_be_written_is_reported(watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "replan-1").write_text("in the way")
    await watch.see(900, windows=3)
    await watch.until(lambda: watch.state is DriftState.COOLING)
    assert "cannot be written" in watch.replanner.status.note


async def test_an_unreachable_router_is_polled_again(watch: Watch) -> None:
    watch.router_is_down = True
    await watch.see(900)
    assert watch.published == []
    watch.router_is_down = False
    await watch.replanner.poll()
    assert watch.state is DriftState.SUSPECT


async def test_stopping_ends_the_planner(watch: Watch) -> None:
    await watch.see(900, windows=3)
    running = asyncio.create_task(watch.replanner.run())
    async with asyncio.timeout(5):
        while not watch.planner.folders:  # noqa: ASYNC110 - the task has no event
            await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert watch.planner.cancelled


# --- the process -----------------------------------------------------------------------------------------------------


def script(folder: Path, code: str) -> RunPlanner:
    path = folder / "planner.py"
    path.write_text(f"import json, pathlib, sys, time\nfolder = pathlib.Path(sys.argv[1])\n{code}\n")
    return partial(plan_in_process, arguments=(str(path),))


@asynccontextmanager
async def waiting_process(folder: Path) -> AsyncIterator[tuple["asyncio.Task[ReplanResult]", list[psutil.Process]]]:
    """A planner that starts a child process and never ends; with both processes."""
    code = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "(folder / 'pid').write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    task = asyncio.ensure_future(script(folder, code)(folder))
    pid_path = folder / "pid"
    try:
        async with asyncio.timeout(20):
            while not (pid_path.exists() and pid_path.read_text()):  # noqa: ASYNC110 - another process writes
                await asyncio.sleep(0.01)
        child = psutil.Process(int(pid_path.read_text()))
        yield task, [child.parent() or child, child]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_result_is_what_the_process_writes(tmp_path: Path) -> None:
    write_result(tmp_path, RESULT)
    text = (tmp_path / "result.json").read_text()
    (tmp_path / "result.json").unlink()
    planner = script(tmp_path, f"(folder / 'result.json').write_text({text!r})")
    assert await planner(tmp_path) == RESULT


async def test_a_process_that_fails_leaves_a_log(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"status 3.*planner\.log"):
        await script(tmp_path, "print('no such device'); sys.exit(3)")(tmp_path)
    assert (tmp_path / "planner.log").read_text() == "no such device\n"


@pytest.mark.parametrize("left", [None, "half a res", "{}", json.dumps({"changes": []})])
async def test_no_result_is_an_error(tmp_path: Path, left: str | None) -> None:
    if left is not None:
        (tmp_path / "result.json").write_text(left)
    with pytest.raises(InternalError, match="no result"):
        await script(tmp_path, "")(tmp_path)


async def test_cancellation_ends_the_planner_and_its_children(tmp_path: Path) -> None:
    async with waiting_process(tmp_path) as (task, processes):
        assert all(process.is_running() for process in processes)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []

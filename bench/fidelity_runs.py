"""The live runs of `bench.fidelity_live`: one cluster is loaded with one run after another, each at a known pace.

A virtual machine shares its memory with strangers, and changes its pace for minutes. So the pace is looked at before
and after every run, and a run around which it was not that of the calibration is made again, some times. (To measure
anew what serving adds, whenever the pace has changed, was worse: it measures the disturbance, which goes.)
"""

import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from bench.load import make_streams
from bench.pace import Pace, measure_pace
from bench.processes import BenchError, Launcher
from bench.serving_profile import measure_running
from core.slo_file import SloFile
from placement.costs.calibration import Calibration
from placement.workload.requests import RequestStream

_PACE_S = 6.0
_SERVING_S = 60.0  # twice as long as `tandem profile`, for serving varies by the second
_TOLERANCE = 0.1  # a pace is measured to 3 %, and so is what it is compared with
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Paced:
    """The machine's pace before a run and after it."""

    before: Pace
    after: Pace

    @property
    def is_steady(self) -> bool:
        return self.before.is_usual(_TOLERANCE) and self.after.is_usual(_TOLERANCE)

    @classmethod
    def read(cls, path: Path) -> "Paced":
        told = json.loads(path.read_text())
        return cls(Pace(**told["before"]), Pace(**told["after"]))


@dataclass(frozen=True, slots=True)
class Run:
    """One run to be made: `share` of what prefill can take. `path` is where its records lie."""

    workload: str
    calibration: Calibration
    slo_path: Path
    slo: SloFile
    share: float
    rate: float
    count: int
    repetition: int
    path: Path

    @property
    def pace_path(self) -> Path:
        """Written last: where it is, the run is whole."""
        return self.path.with_suffix(".pace")

    def paced(self) -> Paced:
        return Paced.read(self.pace_path)

    def stream(self, seed: int) -> RequestStream:
        """The same for every repetition."""
        return make_streams(self.slo, None, (self.rate,), self.count, seed)[0][1]


class _Cluster:
    """One of one worker of each role, and its pace by a calibration."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def calibrate(self, engine: Calibration) -> Calibration:
        """That of the engine with what serving adds; measured again, some times, if the machine changed its pace
        meanwhile. Raises BenchError."""
        for _ in range(_ATTEMPTS):
            serving, road = await measure_running(self._url, engine.terms, engine.kv_bytes_per_token, _SERVING_S)
            calibration = engine.model_copy(update={"serving": serving, "road": road})
            if (await self.pace(calibration)).is_usual(_TOLERANCE / 2):
                return calibration
        print("the machine does not keep its pace", file=sys.stderr, flush=True)
        return calibration

    async def pace(self, calibration: Calibration) -> Pace:
        return await measure_pace(self._url, calibration, _PACE_S)

    async def load(self, run: Run, seed: int) -> None:
        """In a process of its own, as a user would; its file appears only when it is whole."""
        partial = run.path.with_suffix(".partial")
        command = [sys.executable, "-m", "bench.load", "--url", self._url, "--slo", str(run.slo_path), "--timelines"]
        command += ["--rates", str(run.rate), "--requests", str(run.count), "--seed", str(seed)]
        process = await asyncio.create_subprocess_exec(*command, "--json", str(partial), stdout=asyncio.subprocess.PIPE)
        said, _ = await process.communicate()
        if process.returncode not in (0, 3):  # 3: marked by the generator, which the table says
            raise BenchError(f"bench.load ended with {process.returncode}: {said.decode()[-400:]}")
        partial.rename(run.path)


async def measure(
    model: Path,
    settings: Mapping[str, object],
    engine: Calibration,
    known: Calibration | None,
    plan: Callable[[Calibration], Sequence[Run]],
    seed: int,
) -> None:
    """Those runs of one workload whose records are not there yet, on one cluster whose instances have the engine
    `settings`. `engine`: the calibration of the engine by itself; `known`: of that with serving, None if it is to be
    measured first. `plan`: the runs, by that one. Raises BenchError."""
    async with Launcher(model) as launcher:
        router = await launcher.router()
        await launcher.workers(router, settings)
        cluster = _Cluster(f"http://{router.http}")
        calibration = known or await cluster.calibrate(engine)
        missing = [run for run in plan(calibration) if not run.pace_path.exists()]
        before = await cluster.pace(calibration)
        for run in tqdm(missing, desc="live runs", unit="run", disable=None):
            for _ in range(_ATTEMPTS):
                await cluster.load(run, seed)
                after = await cluster.pace(calibration)
                paced, before = Paced(before, after), after
                if paced.is_steady:
                    break
            run.pace_path.write_text(json.dumps(asdict(paced)))

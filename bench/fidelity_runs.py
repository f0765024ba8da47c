"""The live runs of `bench.fidelity_live`: one cluster is loaded with one run after another, each at a known pace.

A virtual machine shares its memory with strangers, and changes its pace for minutes or for seconds. So the pace is
looked at before and after every run, and in the run's own steps: one around which it was not that of the first
calibration, or in which steps took much longer for some seconds, is made again, some times. What serving adds to the
engine's steps is measured first, for rates and targets, and a bit of it after every run: what the simulator is told is
of the same hour as what it is compared with. (To measure it anew only where the pace had changed was worse: that
measures the disturbance, which goes.)
"""

import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from bench.load import make_streams
from bench.load_result import LoadRecord, as_simulation
from bench.pace import Pace, disturbed_s, pace_of
from bench.processes import BenchError, Launcher
from bench.serving_answers import Answers, Prompted, prompted_of
from bench.serving_fit import with_serving
from bench.serving_profile import measure_running, probing
from tandem.core.slo_file import SloFile
from tandem.placement.costs.calibration import Calibration
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import RequestStream

_PACE_S, _PACE_BATCH = 5.0, 4
_PART_S, _PART_BATCHES = 10.0, (1, 2, 4, 8)  # after each run, in turns
_SERVING_S = 60.0  # twice as long as `tandem profile`, for serving varies by the second
_TOLERANCE = 0.1  # a pace is measured to 3 %, and so is what it is compared with
_ATTEMPTS = 3

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Around:
    """What was measured around a run: the machine's pace before it and after it, and what serving adds, after it."""

    before: Pace
    after: Pace
    answers: Answers

    @property
    def is_steady(self) -> bool:
        return self.before.is_usual(_TOLERANCE) and self.after.is_usual(_TOLERANCE)


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
    def around_path(self) -> Path:
        """Written last: where it is, the run is whole."""
        return self.path.with_suffix(".around")

    def around(self) -> Around:
        """Raises BenchError."""
        return _read(self.around_path, _AROUND)

    def told(self) -> dict[str, Any]:
        """What `bench.load` says of it."""
        told: dict[str, Any] = json.loads(self.path.read_bytes())["runs"][0]
        return told

    def records(self) -> tuple[LoadRecord, ...]:
        return tuple(LoadRecord(**one) for one in self.told()["requests"])

    def seen(self, stream: RequestStream) -> SimulationResult:
        """What became of `stream`, in the form of a simulation's result."""
        return as_simulation(stream, self.records(), self.told()["duration_s"])

    def answers(self) -> list[Prompted]:
        return [one for record in self.records() if (one := prompted_of(record)) is not None]

    def is_steady(self, around: Around) -> bool:
        """Whether the machine kept its pace."""
        return around.is_steady and disturbed_s(self.answers(), self.calibration) == 0

    def stream(self, seed: int) -> RequestStream:
        """The same for every repetition."""
        return make_streams(self.slo, None, (self.rate,), self.count, seed)[0][1]


_ANSWERS, _AROUND = TypeAdapter(Answers), TypeAdapter(Around)


class _Cluster:
    """One of one worker of each role, and its pace by a calibration."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._batches = cycle(_PART_BATCHES)

    async def measure_serving(self, engine: Calibration) -> Answers:
        """Again, some times, if the machine changed its pace meanwhile. Raises BenchError."""
        for _ in range(_ATTEMPTS):
            answers = await measure_running(self._url, _SERVING_S)
            pace, _ = await self.look(with_serving(engine, answers))
            if pace.is_usual(_TOLERANCE / 2):
                return answers
        print("the machine does not keep its pace", file=sys.stderr, flush=True)
        return answers

    async def look(self, calibration: Calibration) -> tuple[Pace, Answers]:
        """The pace by this calibration, and a bit of what it was made of. Raises BenchError."""
        async with probing(self._url) as probe:
            loaded = await probe.steady(_PACE_BATCH, _PACE_S)
            answers = await probe.part(next(self._batches), _PART_S)
        answers.steady.append(loaded)
        return pace_of(loaded, calibration), answers

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


def measure(
    model: Path,
    settings: Mapping[str, object],
    engine: Calibration,
    serving_path: Path,
    plan: Callable[[Calibration], Sequence[Run]],
    seed: int,
) -> Answers:
    """Those runs of one workload whose records are not there yet, on one cluster whose instances have the engine
    `settings`; returns everything that was measured beside those in which the machine kept its pace.

    `engine`: the calibration of the engine by itself. `serving_path`: where the first answers lie, or are to lie.
    `plan`: the runs, by the calibration with those. Raises BenchError."""

    answers = _read_answers(serving_path)
    if answers is None or any(not run.around_path.exists() for run in plan(with_serving(engine, answers))):
        answers = asyncio.run(_measure_missing(model, settings, engine, serving_path, plan, seed))
    for run in plan(with_serving(engine, answers)):
        if run.is_steady(around := run.around()):
            answers.add(around.answers)
    return answers


async def _measure_missing(
    model: Path,
    settings: Mapping[str, object],
    engine: Calibration,
    serving_path: Path,
    plan: Callable[[Calibration], Sequence[Run]],
    seed: int,
) -> Answers:
    """With the first answers."""
    async with Launcher(model) as launcher:
        router = await launcher.router()
        await launcher.workers(router, settings)
        cluster = _Cluster(f"http://{router.http}")
        answers = _read_answers(serving_path)
        if answers is None:
            answers = await cluster.measure_serving(engine)
            _write(serving_path, _ANSWERS.dump_json(answers))
        await _run_all(cluster, plan, with_serving(engine, answers), seed)
    return answers


async def _run_all(
    cluster: _Cluster, plan: Callable[[Calibration], Sequence[Run]], calibration: Calibration, seed: int
) -> None:
    missing = [run for run in plan(calibration) if not run.around_path.exists()]
    before, _ = await cluster.look(calibration)
    for run in tqdm(missing, desc="live runs", unit="run", disable=None):
        for _ in range(_ATTEMPTS):
            await cluster.load(run, seed)
            after, answers = await cluster.look(calibration)
            around, before = Around(before, after, answers), after
            if run.is_steady(around):
                break
        _write(run.around_path, _AROUND.dump_json(around))


def _read_answers(path: Path) -> Answers | None:
    return _read(path, _ANSWERS) if path.exists() else None


def _read(path: Path, form: TypeAdapter[T]) -> T:
    try:
        return form.validate_json(path.read_bytes())
    except ValidationError:
        raise BenchError(f"{path} was written by another version of this script: measure anew, with --fresh") from None


def _write(path: Path, told: bytes) -> None:
    path.write_bytes(told)

"""The live runs of `bench.fidelity.live`: one cluster serves one run after another, at a known speed of the machine.

A virtual machine shares its memory with other machines, and its speed changes for minutes or for seconds. So the drift
of step times is measured before and after every run, and in the steps of the run. A run is repeated, up to three times,
if the steps around it had drifted from the first calibration, or if its own steps took much longer for some seconds.
Serving costs are measured first, for rates and targets, and a part of them again after every run, so that the simulator
gets numbers of the same hour. (Measuring them again only after a drift was worse: that measures the disturbance, which
does not last.)
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

from bench.fidelity.live.drift import StepTimeDrift, disturbed_s, drift_in_period
from bench.load.requests import make_streams
from bench.load.result import GENERATOR_TOO_SLOW, LoadRecord, as_simulation
from tandem.core.slo_file import SloFile
from tandem.placement.costs.calibration import Calibration
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import RequestStream
from tandem.profiling.cluster import ClusterLauncher
from tandem.profiling.errors import MeasurementError
from tandem.profiling.serving_fit import with_serving
from tandem.profiling.serving_profile import measure_running, open_probe
from tandem.profiling.serving_samples import RequestSample, ServingSamples

_CHECKOUT = Path(__file__).parents[3]
_DRIFT_S, _DRIFT_BATCH = 5.0, 4
_SAMPLES_S, _SAMPLES_BATCHES = 10.0, (1, 2, 4, 8)  # after each run, the batches in turns
_SERVING_S = 60.0  # twice as long as `tandem profile`, because serving varies by the second
_TOLERANCE = 0.1  # drift is measured to 3 %, and so is the calibration
_ATTEMPTS = 3

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SpeedCheck:
    """Measured around a run: the drift of step times before and after it, and serving samples after it."""

    before: StepTimeDrift
    after: StepTimeDrift
    samples: ServingSamples

    @property
    def is_steady(self) -> bool:
        return self.before.is_within(_TOLERANCE) and self.after.is_within(_TOLERANCE)


@dataclass(frozen=True, slots=True)
class LiveRun:
    """One run: its rate is `share` of the capacity of prefill. `path`: the file of its records."""

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
    def check_path(self) -> Path:
        """Written last: the run is complete if the file exists."""
        return self.path.with_suffix(".check")

    def read_check(self) -> SpeedCheck:
        """Raises MeasurementError."""
        return _read(self.check_path, _CHECK)

    def read_report(self) -> dict[str, Any]:
        """The report of `bench.load`."""
        report: dict[str, Any] = json.loads(self.path.read_bytes())["runs"][0]
        return report

    def records(self) -> tuple[LoadRecord, ...]:
        return tuple(LoadRecord(**fields) for fields in self.read_report()["requests"])

    def as_simulation(self, stream: RequestStream) -> SimulationResult:
        """The live results of `stream` in the form of a simulation's result."""
        return as_simulation(stream, self.records(), self.read_report()["duration_s"])

    def samples(self) -> list[RequestSample]:
        return [sample for record in self.records() if (sample := request_sample_of(record)) is not None]

    def is_steady(self, check: SpeedCheck) -> bool:
        """Whether the machine's speed stayed the same."""
        return check.is_steady and disturbed_s(self.samples(), self.calibration) == 0

    def stream(self, seed: int) -> RequestStream:
        """The same for every repetition."""
        return make_streams(self.slo, None, (self.rate,), self.count, seed)[0][1]


_SAMPLES, _CHECK = TypeAdapter(ServingSamples), TypeAdapter(SpeedCheck)


def request_sample_of(record: LoadRecord) -> RequestSample | None:
    """None if the response was incomplete."""
    if not record.is_complete or record.timeline is None:
        return None
    assert record.sent_s is not None, "the response is complete"
    assert record.first_s is not None
    assert record.last_s is not None
    return RequestSample.from_timeline(
        record.num_prompt_tokens,
        record.num_output_tokens,
        record.sent_s,
        record.first_s,
        record.last_s,
        record.timeline,
    )


class _LiveCluster:
    """A running cluster of one worker of each role. Its methods raise MeasurementError."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._batches = cycle(_SAMPLES_BATCHES)

    async def measure_serving(self, engine: Calibration) -> ServingSamples:
        """Repeated, up to three times in all, if step times drift meanwhile."""
        for _ in range(_ATTEMPTS):
            samples = await measure_running(self._url, _SERVING_S)
            drift, _ = await self.check_speed(with_serving(engine, samples))
            if drift.is_within(_TOLERANCE / 2):
                return samples
        print("the speed of the machine is not steady", file=sys.stderr, flush=True)
        return samples

    async def check_speed(self, calibration: Calibration) -> tuple[StepTimeDrift, ServingSamples]:
        """The drift of step times from this calibration, and new samples for one."""
        async with open_probe(self._url) as probe:
            period = await probe.steady(_DRIFT_BATCH, _DRIFT_S)
            samples = await probe.all_kinds(next(self._batches), _SAMPLES_S)
        samples.steady.append(period)
        return drift_in_period(period, calibration), samples

    async def load(self, run: LiveRun, seed: int) -> None:
        """Runs `bench.load` in a process of its own. The file of records appears when it is complete."""
        partial = run.path.with_suffix(".partial")
        command = [sys.executable, "-m", "bench.load", "--url", self._url, "--slo", str(run.slo_path), "--timelines"]
        command += ["--rates", str(run.rate), "--requests", str(run.count), "--seed", str(seed)]
        process = await asyncio.create_subprocess_exec(*command, "--json", str(partial), stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        if process.returncode not in (0, GENERATOR_TOO_SLOW):  # which the records say, too
            raise MeasurementError(f"bench.load ended with {process.returncode}: {output.decode()[-400:]}")
        partial.rename(run.path)


@dataclass(frozen=True, slots=True)
class LiveWorkload:
    """The runs of one workload, on one cluster whose instances have the engine `settings`.

    `engine`: the calibration of the engine alone. `serving_path`: the file of the first serving samples. `plan`: the
    runs, for the calibration from these samples."""

    model: Path
    settings: Mapping[str, object]
    engine: Calibration
    serving_path: Path
    plan: Callable[[Calibration], Sequence[LiveRun]]
    seed: int

    def measure(self) -> ServingSamples:
        """Makes the missing runs. Returns all serving samples, except those around runs during which the machine's
        speed changed. Raises MeasurementError."""
        samples = self._read_samples()
        if samples is None or any(not run.check_path.exists() for run in self._runs(samples)):
            samples = asyncio.run(self._measure_missing())
        for run in self._runs(samples):
            if run.is_steady(check := run.read_check()):
                samples.add(check.samples)
        return samples

    def _runs(self, samples: ServingSamples) -> Sequence[LiveRun]:
        return self.plan(with_serving(self.engine, samples))

    def _read_samples(self) -> ServingSamples | None:
        return _read(self.serving_path, _SAMPLES) if self.serving_path.exists() else None

    async def _measure_missing(self) -> ServingSamples:
        """Returns the first serving samples."""
        async with ClusterLauncher(self.model, checkout=_CHECKOUT) as launcher:
            router = await launcher.start_router()
            await launcher.start_workers(router, self.settings)
            cluster = _LiveCluster(f"http://{router.http}")
            samples = self._read_samples()
            if samples is None:
                samples = await cluster.measure_serving(self.engine)
                _write(self.serving_path, _SAMPLES.dump_json(samples))
            await self._run_missing(cluster, self._runs(samples))
        return samples

    async def _run_missing(self, cluster: _LiveCluster, runs: Sequence[LiveRun]) -> None:
        calibration = runs[0].calibration
        before, _ = await cluster.check_speed(calibration)
        missing = [run for run in runs if not run.check_path.exists()]
        for run in tqdm(missing, desc="live runs", unit="run", disable=None):
            for _ in range(_ATTEMPTS):
                await cluster.load(run, self.seed)
                after, samples = await cluster.check_speed(calibration)
                check, before = SpeedCheck(before, after, samples), after
                if run.is_steady(check):
                    break
            _write(run.check_path, _CHECK.dump_json(check))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _read(path: Path, adapter: TypeAdapter[T]) -> T:
    try:
        return adapter.validate_json(path.read_bytes())
    except ValidationError:
        raise MeasurementError(f"{path} was written by another version of bench.fidelity.live: use --fresh") from None

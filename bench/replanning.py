"""`python -m bench.replanning`: does watching a plan follow its requests, and does it keep still when it should?

Two traces of real traffic alternate, Azure's conversation and code services of 2023, on a virtual clock. What is run is
what `tandem serve` runs: the router's profile, `deploy.replanner`, and the simulator as judge. Only the planner is a
small one, which splits a fixed number of alike instances between prefill and decode: a search of minutes would tell
nothing more about hysteresis. The plan that runs is the best split for conversation, and stays it: nobody applies what
is proposed.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tandem.core.clock import ManualClock
from tandem.core.config_file import load_config
from tandem.core.plan import Expected, Plan, PlanGroup
from tandem.core.replanning import DriftState, ReplanStatus
from tandem.core.slo_file import SloFile
from tandem.core.workload_profile import ProfileSnapshot, ServedRequest, WorkloadProfile
from tandem.deploy.replanner import Replanner, ReplanResult, RunPlanner
from tandem.placement.replanning.live_workload import RUNNING_PLAN_NAME, SLO_FILE_NAME
from tandem.placement.replanning.replan import Forecast, changes_between, forecast_of, gain_of
from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.streams import make_stream
from tandem.placement.workload.traces import load_trace

_MODEL, _DEVICE, _TP = "Llama-3.1-70B", "H100-80GB-SXM5", 2
_INSTANCES = 8
_KV_TOKENS = 60_000  # what two such devices leave beside the weights, about
_WINDOW_S = 300.0
_LOOK_S = 30.0
_KINDS = ("conv", "code")  # what the plan was made for, and the other

SLO_FILE = SloFile.model_validate(
    {
        "model": _MODEL,
        "cluster": {"nodes": [{"device": _DEVICE, "devices": 8, "count": 2}]},
        "slo": [{"ttft_s": 1.0, "tpot_s": 0.05}],
        "workload": {"dataset": "azure_conv"},
        "search": {"requests": 1000},
    }
)


@dataclass(frozen=True, slots=True)
class Case:
    """Each kind of traffic lasts `phase_s`; infinite: the first one for ever."""

    name: str
    phase_s: float


CASES = (
    Case("conversation only", float("inf")),
    Case("1 min each", 60.0),
    Case("5 min each (a window)", 300.0),
    Case("15 min each (three windows)", 900.0),
    Case("1 h each", 3600.0),
    Case("8 h each", 8 * 3600.0),
)


@dataclass(slots=True)
class Outcome:
    """`delays_s`: from the beginning of a phase of the other traffic to the proposal for it."""

    windows: int = 0
    drifted: int = 0  # windows whose strongest change is 1 or more
    onsets: int = 0  # of them, those after one that is not: what would be planned for without hysteresis
    replans: int = 0
    proposals: int = 0
    withdrawn: int = 0
    in_first_day: int = 0
    delays_s: list[float] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


class SplitPlanner:
    """A `deploy.replanner.RunPlanner`. Forecasts are made once for each quarter of the way from one traffic to
    the other, by the mean length of answers."""

    def __init__(self, mean_answers: Sequence[float]) -> None:
        """`mean_answers`: tokens, of `_KINDS`."""
        self._mean_answers = mean_answers
        self._forecasts: dict[tuple[int, int], Forecast] = {}

    def best(self, question: SloFile, rate: float) -> Plan:
        splits = range(2, _INSTANCES - 1)
        return max(
            (with_expectation(split(prefill), self._forecast(prefill, question, rate), rate) for prefill in splits),
            key=lambda plan: plan.expected.goodput if plan.expected else 0.0,
        )

    async def __call__(self, folder: Path) -> ReplanResult:
        question = load_config(folder / SLO_FILE_NAME, SloFile)
        assert question.workload.trace is not None, "live requests are a trace"
        rate = load_trace(question.workload.trace).rate
        running = load_config(folder / RUNNING_PLAN_NAME, Plan)
        proposed = self.best(question, rate)
        forecast = self._forecast(running.groups[0].instances, question, rate)
        rival = self._forecast(proposed.groups[0].instances, question, rate)
        gain = gain_of((running, forecast), (proposed, rival), question)
        changes = changes_between(running, proposed)
        return ReplanResult("; ".join(changes), changes, gain, regains=False, attainment=forecast.attainment)

    def _forecast(self, prefill: int, question: SloFile, rate: float) -> Forecast:
        requests = make_stream(question.workload, question.slo, count=question.search.requests, rate=rate, seed=0)
        planned, other = self._mean_answers
        quarter = round(4 * (planned - float(requests.output_tokens.mean())) / (planned - other))
        key = (quarter, prefill)
        if key not in self._forecasts:
            self._forecasts[key] = forecast_of(split(prefill), question, rate)
        return self._forecasts[key]


def split(prefill: int) -> Plan:
    """The instances, `prefill` of them for prefill."""
    decode = _INSTANCES - prefill
    shape = {"device": _DEVICE, "tp": _TP, "kv_tokens": _KV_TOKENS, "max_batch": 256}
    groups = [{"role": "prefill", "instances": prefill}, {"role": "decode", "instances": decode}]
    return Plan(
        model=_MODEL,
        verdict="disaggregate",
        groups=tuple(PlanGroup.model_validate(group | shape) for group in groups),
    )


def with_expectation(plan: Plan, forecast: Forecast, rate: float) -> Plan:
    goodput = forecast.goodput
    expected = Expected(
        rate=rate,
        goodput=goodput,
        goodput_ci=(goodput, goodput),
        goodput_per_device=goodput / plan.num_devices,
        classes=(),
    )
    return plan.model_copy(update={"expected": expected})


def traces(folder: Path) -> dict[str, RequestStream]:
    """Azure's own, with its bursts, where they are at hand; else their lengths with Poisson arrivals."""
    paths = {kind: folder / f"azure_2023_{kind}.csv.gz" for kind in _KINDS}
    if all(path.exists() for path in paths.values()):
        return {kind: load_trace(path) for kind, path in paths.items()}
    print(f"no Azure traces in {folder}: their lengths, with Poisson arrivals, take their place")
    sections = {kind: SLO_FILE.workload.model_copy(update={"dataset": f"azure_{kind}"}) for kind in _KINDS}
    return {
        kind: make_stream(section, SLO_FILE.slo, count=10_000, rate=4.0, seed=0) for kind, section in sections.items()
    }


def traffic(case: Case, streams: dict[str, RequestStream], until_s: float) -> Iterator[tuple[float, str, int, int]]:
    """(arrival_s, kind, prompt tokens, output tokens) in order. Each trace goes on where its last phase ended, and
    begins anew when it is over."""
    rows = {
        kind: list(zip(*(array.tolist() for array in (s.arrival_s, s.prompt_tokens, s.output_tokens)), strict=True))
        for kind, s in streams.items()
    }
    place = dict.fromkeys(streams, 0)
    began_s, kind = 0.0, _KINDS[0]
    while began_s < until_s:
        ends_s = min(began_s + case.phase_s, until_s)
        at_s = began_s
        while True:
            arrival_s, prompt_tokens, output_tokens = rows[kind][place[kind]]
            place[kind] = (place[kind] + 1) % len(rows[kind])
            yield at_s, kind, prompt_tokens, output_tokens
            at_s += max(0.0, rows[kind][place[kind]][0] - arrival_s)
            if at_s >= ends_s:
                break
        began_s, kind = ends_s, _KINDS[1 - _KINDS.index(kind)]


class Replay:
    """One case: the router's side of it, and a replanner that looks at it."""

    def __init__(self, plan: Plan, planner: RunPlanner, folder: Path) -> None:
        self.outcome = Outcome()
        self._clock = ManualClock()
        self._profile = WorkloadProfile(window_s=_WINDOW_S, random=Random(0), now_s=0.0)
        self._status = ReplanStatus(DriftState.STABLE)
        self._windows = 0
        self._was_drifted = False
        self._phase_began_s = 0.0
        self._replanner = Replanner(
            plan, SLO_FILE, self._snapshot, self._publish, run_planner=planner, clock=self._clock, folder=folder
        )

    async def run(self, requests: Iterator[tuple[float, str, int, int]]) -> Outcome:
        """An answer counts as over when its request comes: seconds are nothing beside a window."""
        look_s, last_kind = _LOOK_S, ""
        for at_s, kind, prompt_tokens, output_tokens in requests:
            while at_s >= look_s:
                self._clock.advance(look_s - self._clock.now_s())
                await self._look()
                look_s += _LOOK_S
            if kind != last_kind:
                self._phase_began_s, last_kind = at_s, kind
            self._profile.arrived(at_s)
            self._profile.finished(ServedRequest(prompt_tokens, output_tokens), at_s)
        return self.outcome

    async def _look(self) -> None:
        await self._replanner.poll()
        if self._replanner.status.state is DriftState.REPLANNING:
            await asyncio.sleep(0)
            while self._replanner.status.state is DriftState.REPLANNING:
                await asyncio.sleep(0.001)
                await self._replanner.poll()

    async def _snapshot(self) -> ProfileSnapshot | None:
        snapshot = self._profile.snapshot(self._clock.now_s())
        if snapshot is not None and snapshot.window == self._windows:
            self._windows += 1
        return snapshot

    async def _publish(self, status: ReplanStatus) -> None:
        outcome, now_s = self.outcome, self._clock.now_s()
        if self._windows > outcome.windows:
            outcome.windows = self._windows
            is_drifted = status.drift >= 1.0
            outcome.drifted += is_drifted
            outcome.onsets += is_drifted and not self._was_drifted
            self._was_drifted = is_drifted
        if status.state is not self._status.state:
            outcome.events.append(f"{now_s / 3600:6.2f} h  {status.state.value:<10} {status.note}")
            outcome.replans += status.state is DriftState.REPLANNING
            outcome.withdrawn += self._status.state is DriftState.PROPOSED
        if status.proposal is not None and self._status.proposal is None:
            outcome.proposals += 1
            outcome.in_first_day += now_s < 86400
            outcome.gains.append(status.proposal.gain)
            outcome.delays_s.append(now_s - self._phase_began_s)
        self._status = status


def row(case: Case, outcome: Outcome) -> list[str]:
    delays_s = sorted(outcome.delays_s)
    return [
        case.name,
        str(outcome.windows),
        f"{outcome.drifted / outcome.windows:.0%}",
        str(outcome.onsets),
        str(outcome.replans),
        str(outcome.proposals),
        str(outcome.in_first_day),
        str(outcome.withdrawn),
        f"{delays_s[len(delays_s) // 2] / 60:.0f} min" if delays_s and case.phase_s > _WINDOW_S else "-",
        f"{min(outcome.gains):+.0%}" if outcome.gains else "-",
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in rows)


async def measure(streams: dict[str, RequestStream], hours: float, show_events: bool) -> None:
    planner = SplitPlanner([float(streams[kind].output_tokens.mean()) for kind in _KINDS])
    plan = planner.best(SLO_FILE, 5.0)
    print(
        f"{_MODEL} on {plan.num_devices} x {_DEVICE}, {_TP} for an instance; windows of {_WINDOW_S:.0f} s, {hours:g} h"
    )
    print(f"the plan for conversation: {plan.groups[0].instances} prefill, {plan.groups[1].instances} decode")
    rows = [
        [
            "PHASES",
            "WINDOWS",
            "DRIFTED",
            "ONSETS",
            "REPLANS",
            "PROPOSALS",
            "FIRST DAY",
            "WITHDRAWN",
            "DELAY",
            "LEAST GAIN",
        ]
    ]
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            outcome = await Replay(plan, planner, Path(folder)).run(traffic(case, streams, hours * 3600))
        rows.append(row(case, outcome))
        if show_events:
            print(f"\n{case.name}")
            print("\n".join(outcome.events))
    print()
    print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.replanning", description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", type=Path, default=Path("../shared/data/traces"), help="folder of Azure's traces")
    parser.add_argument("--hours", type=float, default=48.0, help="virtual hours of each case (default 48)")
    parser.add_argument("--events", action="store_true", help="print every change of state")
    arguments = parser.parse_args()
    asyncio.run(measure(traces(arguments.traces), arguments.hours, arguments.events))


if __name__ == "__main__":
    main()

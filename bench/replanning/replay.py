"""Replays alternating traffic against the router's profile and the replanner, on a virtual clock."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from bench.replanning.split_planner import DEVICE, MODEL
from tandem.core.clock import ManualClock
from tandem.core.plan import Plan
from tandem.core.replanning import DriftState, ReplanStatus
from tandem.core.slo_file import SloFile
from tandem.core.workload_profile import ProfileSnapshot, ServedRequest, WorkloadProfile
from tandem.deploy.replanner import Replanner, RunPlanner
from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.streams import make_stream
from tandem.placement.workload.traces import load_trace

WINDOW_S = 300.0
KINDS = ("conv", "code")  # the plan is made for the first kind of traffic
_POLL_S = 30.0

SLO_FILE = SloFile.model_validate(
    {
        "model": MODEL,
        "cluster": {"nodes": [{"device": DEVICE, "devices": 8, "count": 2}]},
        "slo": [{"ttft_s": 1.0, "tpot_s": 0.05}],
        "workload": {"dataset": "azure_conv"},
        "search": {"requests": 1000},
    }
)


@dataclass(frozen=True, slots=True)
class ReplayCase:
    """Each kind of traffic lasts `phase_s`. Infinite: only the first kind."""

    name: str
    phase_s: float


@dataclass(slots=True)
class ReplayOutcome:
    """`delays_s`: from the beginning of a phase of the other kind of traffic to the proposal for it."""

    windows: int = 0
    drifted: int = 0  # windows whose strongest change is 1 or more
    onsets: int = 0  # drifted windows after one that had not drifted: replans without hysteresis
    replans: int = 0
    proposals: int = 0
    withdrawn: int = 0
    in_first_day: int = 0
    delays_s: list[float] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


def traces(folder: Path) -> dict[str, RequestStream]:
    """Azure's traces with their bursts, if the folder has them, else their lengths with Poisson arrivals."""
    paths = {kind: folder / f"azure_2023_{kind}.csv.gz" for kind in KINDS}
    if all(path.exists() for path in paths.values()):
        return {kind: load_trace(path) for kind, path in paths.items()}
    print(f"no Azure traces in {folder}: using their lengths with Poisson arrivals")
    sections = {kind: SLO_FILE.workload.model_copy(update={"dataset": f"azure_{kind}"}) for kind in KINDS}
    return {
        kind: make_stream(section, SLO_FILE.slo, count=10_000, rate=4.0, seed=0) for kind, section in sections.items()
    }


def traffic(
    case: ReplayCase, streams: dict[str, RequestStream], until_s: float
) -> Iterator[tuple[float, str, int, int]]:
    """(arrival_s, kind, prompt tokens, output tokens) in order. Each trace continues where its last phase ended, and
    starts again at its end."""
    rows = {
        kind: list(zip(*(array.tolist() for array in (s.arrival_s, s.prompt_tokens, s.output_tokens)), strict=True))
        for kind, s in streams.items()
    }
    next_row = dict.fromkeys(streams, 0)
    began_s, kind = 0.0, KINDS[0]
    while began_s < until_s:
        ends_s = min(began_s + case.phase_s, until_s)
        at_s = began_s
        while True:
            arrival_s, prompt_tokens, output_tokens = rows[kind][next_row[kind]]
            next_row[kind] = (next_row[kind] + 1) % len(rows[kind])
            yield at_s, kind, prompt_tokens, output_tokens
            at_s += max(0.0, rows[kind][next_row[kind]][0] - arrival_s)
            if at_s >= ends_s:
                break
        began_s, kind = ends_s, KINDS[1 - KINDS.index(kind)]


class Replay:
    """One case: the router's profile, and a replanner that watches it."""

    def __init__(self, plan: Plan, planner: RunPlanner, folder: Path) -> None:
        self.outcome = ReplayOutcome()
        self._clock = ManualClock()
        self._profile = WorkloadProfile(window_s=WINDOW_S, random=Random(0), now_s=0.0)
        self._status = ReplanStatus(DriftState.STABLE)
        self._windows = 0
        self._was_drifted = False
        self._phase_began_s = 0.0
        self._replanner = Replanner(
            plan, SLO_FILE, self._snapshot, self._publish, run_planner=planner, clock=self._clock, folder=folder
        )

    async def run(self, requests: Iterator[tuple[float, str, int, int]]) -> ReplayOutcome:
        """A request counts as finished when it arrives: its seconds are short compared with a window."""
        poll_s, last_kind = _POLL_S, ""
        for at_s, kind, prompt_tokens, output_tokens in requests:
            while at_s >= poll_s:
                self._clock.advance(poll_s - self._clock.now_s())
                await self._poll()
                poll_s += _POLL_S
            if kind != last_kind:
                self._phase_began_s, last_kind = at_s, kind
            self._profile.arrived(at_s)
            self._profile.finished(ServedRequest(prompt_tokens, output_tokens), at_s)
        return self.outcome

    async def _poll(self) -> None:
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

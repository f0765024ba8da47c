"""Detects that the running plan no longer fits its workload, and starts the planner for a new plan.

    router --window--> DriftDetector --replan--> planner process --result--> proposal --> router: status, metrics

The replanner only proposes plans; it does not change the running cluster.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from tandem.core.clock import Clock
from tandem.core.errors import TandemError, UnavailableError
from tandem.core.plan import Plan
from tandem.core.replanning import DriftState, Proposal, ReplanStatus, WorkloadChange
from tandem.core.slo_file import SloFile
from tandem.core.workload_profile import ProfileSnapshot
from tandem.placement.replanning.drift import Decision, DriftDetector, DriftPolicy
from tandem.placement.replanning.live_workload import planned_workload, write_replan_input
from tandem.placement.replanning.workload_distance import WorkloadStats, thresholds_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplanResult:
    """`gain` and `regains`: see `placement.replanning.replan`. `attainment`: of the running plan on the live
    workload."""

    summary: str
    changes: tuple[str, ...]
    gain: float
    regains: bool
    attainment: float


RunPlanner = Callable[[Path], Awaitable[ReplanResult]]
"""Plans for the input that `placement.replanning.live_workload.write_replan_input` wrote to the folder. May take
minutes. Raises a TandemError. Cancellation ends all its work."""
ReadProfile = Callable[[], Awaitable[ProfileSnapshot | None]]
Publish = Callable[[ReplanStatus], Awaitable[None]]


class Replanner:
    """The replanner of one plan. `read_profile` returns the last closed window; each window is evaluated once.
    `publish` receives the status at every poll, so that a restarted router receives it, too. `notify` receives a
    sentence about each event, once. Inputs and results of the planner are in `folder`/replan-1, replan-2, ...

    Raises ConfigError if the workload of the plan is unknown.
    """

    def __init__(
        self,
        plan: Plan,
        slo_file: SloFile,
        read_profile: ReadProfile,
        publish: Publish,
        *,
        run_planner: RunPlanner,
        clock: Clock,
        folder: Path,
        notify: Callable[[str], None] = logger.info,
        policy: DriftPolicy | None = None,
        poll_s: float = 5.0,
    ) -> None:
        self._plan = plan
        self._slo_file = slo_file
        self._read_profile = read_profile
        self._publish = publish
        self._run_planner = run_planner
        self._clock = clock
        self._folder = folder
        self._notify = notify
        self._poll_s = poll_s
        self._detector = DriftDetector(planned_workload(plan, slo_file), thresholds_for(plan, slo_file), policy)
        self._windows: deque[ProfileSnapshot] = deque(maxlen=self._detector.max_windows_to_confirm)
        self._planning: asyncio.Task[ReplanResult] | None = None
        self._num_replans = 0
        self._proposal: Proposal | None = None
        self._note = "no window of requests has closed yet"

    @property
    def status(self) -> ReplanStatus:
        return ReplanStatus(self._detector.state, self._detector.changes, self._note, self._proposal)

    async def run(self) -> None:
        """Polls until cancelled; then ends a running planner."""
        try:
            while True:
                await self.poll()
                await self._pause()
        finally:
            if self._planning is not None:
                self._planning.cancel()
                await asyncio.gather(self._planning, return_exceptions=True)

    async def poll(self) -> None:
        """Take a finished planner's result, evaluate a newly closed window, publish the status."""
        if self._planning is not None and self._planning.done():
            self._take_result(self._planning)
            self._planning = None
        try:
            window = await self._read_profile()
            if window is not None and (not self._windows or window != self._windows[-1]):
                self._windows.append(window)
                self._evaluate(window)
            await self._publish(self.status)
        except TandemError as error:  # e.g. the router restarts
            logger.debug("the router did not reply: %s", error.message)

    async def _pause(self) -> None:
        """Until the next poll, or until the planner finishes."""
        if self._planning is None:
            await asyncio.sleep(self._poll_s)
        else:
            await asyncio.wait((self._planning,), timeout=self._poll_s)

    def _evaluate(self, window: ProfileSnapshot) -> None:
        match self._detector.observe(WorkloadStats.live(window), self._clock.now_s()):
            case Decision.REPLAN:
                self._start_planning()
            case Decision.WITHDRAW:
                self._proposal = None
                self._report("the workload no longer fits the proposal; the proposal is withdrawn")
            case Decision.NOTHING if self._detector.state is DriftState.STABLE:
                self._note = "the workload is as planned"
            case Decision.NOTHING if self._detector.state is DriftState.SUSPECT:
                self._note = "the workload may have changed"

    def _start_planning(self) -> None:
        windows = list(self._windows)[-self._detector.windows_to_confirm :]
        self._num_replans += 1
        self._report(f"the workload has changed ({_strongest(self._detector.changes)}); planning again")
        self._planning = asyncio.create_task(
            self._plan_again(self._replan_folder, ProfileSnapshot.pooled(windows)), name="plan again"
        )

    @property
    def _replan_folder(self) -> Path:
        return self._folder / f"replan-{self._num_replans}"

    async def _plan_again(self, folder: Path, snapshot: ProfileSnapshot) -> ReplanResult:
        try:
            await asyncio.to_thread(write_replan_input, folder, self._plan, self._slo_file, snapshot)
        except OSError as error:
            raise UnavailableError(f"{folder} cannot be written ({error.strerror})") from error
        return await self._run_planner(folder)

    def _take_result(self, planning: "asyncio.Task[ReplanResult]") -> None:
        now_s, folder = self._clock.now_s(), self._replan_folder
        try:
            result = planning.result()
        except TandemError as error:
            self._detector.record_result(None, now_s)
            self._report(f"planning again failed: {error.message}")
            return
        attainment = f"attainment of the running plan: {result.attainment:.0%}"
        if self._detector.record_result(result.gain, now_s, regains=result.regains):
            self._proposal = Proposal(result.summary, result.changes, result.gain, str(folder))
            changes = "; ".join(result.changes) or "settings only"
            self._report(f"another plan would gain {result.gain:+.0%}: {changes} ({attainment}; see {folder})")
        else:
            self._report(f"no proposal: the best plan for this workload gains only {result.gain:+.0%} ({attainment})")

    def _report(self, note: str) -> None:
        self._note = note
        self._notify(note)


def _strongest(changes: tuple[WorkloadChange, ...]) -> str:
    change = max(changes, key=lambda change: change.strength)
    return f"{change.name} {change.planned:.3g} -> {change.live:.3g}"

"""Watches whether the plan that runs still fits its requests, and has another one made when it does not.

    router --window--> DriftDetector --replan--> planner process --answer--> proposal --> router: status, metrics

It decides and says what it decided; nothing of the running cluster is changed.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tandem.core.clock import Clock
from tandem.core.errors import TandemError, UnavailableError
from tandem.core.plan import Plan
from tandem.core.replanning import Change, DriftState, Proposal, ReplanStatus
from tandem.core.slo_file import SloFile
from tandem.core.workload_profile import ProfileSnapshot
from tandem.placement.replanning.drift import Decision, DriftDetector, DriftPolicy
from tandem.placement.replanning.live_workload import planned_workload, write_question
from tandem.placement.replanning.workload_distance import Workload, limits_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplanAnswer:
    """`gain` and `regains`: see `placement.replanning.replan`. `attainment`: of the running plan, on live requests."""

    summary: str
    changes: tuple[str, ...]
    gain: float
    regains: bool
    attainment: float


class Planner(Protocol):
    async def answer(self, folder: Path) -> ReplanAnswer:
        """Plan for the question that `placement.replanning.live_workload.write_question` has left in `folder`.

        May take minutes. Raises a TandemError; when cancelled, nothing of it runs on.
        """
        ...


ProfileSource = Callable[[], Awaitable[ProfileSnapshot | None]]
Publish = Callable[[ReplanStatus], Awaitable[None]]


class Replanner:
    """Of one plan. `profile_source` gives the last closed window; every window is judged once. `publish` is told the
    status at every look, so that a router which was started again hears of it too; `tell`, of each event once, in a
    sentence. Questions and answers go to
    `folder`/replan-1, replan-2, ...

    Raises ConfigError if the plan's own workload cannot be made out.
    """

    def __init__(
        self,
        plan: Plan,
        slo_file: SloFile,
        profile_source: ProfileSource,
        publish: Publish,
        *,
        planner: Planner,
        clock: Clock,
        folder: Path,
        tell: Callable[[str], None] = logger.info,
        policy: DriftPolicy | None = None,
        poll_s: float = 5.0,
    ) -> None:
        self._plan = plan
        self._slo_file = slo_file
        self._profile_source = profile_source
        self._publish = publish
        self._planner = planner
        self._clock = clock
        self._folder = folder
        self._tell_someone = tell
        self._poll_s = poll_s
        self._detector = DriftDetector(planned_workload(plan, slo_file), limits_of(plan, slo_file), policy)
        self._judged: deque[ProfileSnapshot] = deque(maxlen=self._detector.most_windows_to_confirm)
        self._planning: asyncio.Task[ReplanAnswer] | None = None
        self._questions = 0
        self._proposal: Proposal | None = None
        self._note = "no window of requests has closed yet"

    @property
    def status(self) -> ReplanStatus:
        return ReplanStatus(self._detector.state, self._detector.changes, self._note, self._proposal)

    async def run(self) -> None:
        """Until cancelled; ends a planner that still runs."""
        try:
            while True:
                await self.look()
                await self._pause()
        finally:
            if self._planning is not None:
                self._planning.cancel()
                await asyncio.gather(self._planning, return_exceptions=True)

    async def look(self) -> None:
        """One round: an answer that has come, a window that has closed, the word to the router."""
        if self._planning is not None and self._planning.done():
            self._take_answer(self._planning)
            self._planning = None
        try:
            snapshot = await self._profile_source()
            if snapshot is not None and (not self._judged or snapshot != self._judged[-1]):
                self._judged.append(snapshot)
                self._judge(snapshot)
            await self._publish(self.status)
        except TandemError as error:  # the router is being started again
            logger.debug("the router did not answer: %s", error.message)

    async def _pause(self) -> None:
        """Until the next round; an answer does not wait for it."""
        if self._planning is None:
            await asyncio.sleep(self._poll_s)
        else:
            await asyncio.wait((self._planning,), timeout=self._poll_s)

    def _judge(self, snapshot: ProfileSnapshot) -> None:
        match self._detector.observe(Workload.live(snapshot), self._clock.now_s()):
            case Decision.REPLAN:
                self._ask()
            case Decision.WITHDRAW:
                self._proposal = None
                self._tell("the requests that the proposal was for come no more; it is withdrawn")
            case Decision.NOTHING if self._detector.state in (DriftState.STABLE, DriftState.SUSPECT):
                self._note = _say_state(self._detector.state)

    def _ask(self) -> None:
        windows = list(self._judged)[-self._detector.windows_to_confirm :]
        self._questions += 1
        folder = self._folder / f"replan-{self._questions}"
        self._tell(f"requests are unlike those planned for ({_say_strongest(self._detector.changes)}); planning again")
        self._planning = asyncio.create_task(
            self._plan_again(folder, ProfileSnapshot.pooled(windows)), name="plan again"
        )

    async def _plan_again(self, folder: Path, snapshot: ProfileSnapshot) -> ReplanAnswer:
        try:
            await asyncio.to_thread(write_question, folder, self._plan, self._slo_file, snapshot)
        except OSError as error:
            raise UnavailableError(f"{folder} cannot be written ({error.strerror})") from error
        return await self._planner.answer(folder)

    def _take_answer(self, planning: "asyncio.Task[ReplanAnswer]") -> None:
        now_s, folder = self._clock.now_s(), self._folder / f"replan-{self._questions}"
        try:
            answer = planning.result()
        except TandemError as error:
            self._detector.answered(None, now_s)
            self._tell(f"planning again failed: {error.message}")
            return
        why = f"the running plan would keep {answer.attainment:.0%} of requests on time"
        if self._detector.answered(answer.gain, now_s, regains=answer.regains):
            self._proposal = Proposal(answer.summary, answer.changes, answer.gain, str(folder))
            changes = "; ".join(answer.changes) or "settings only"
            self._tell(f"another plan would gain {answer.gain:+.0%}: {changes} ({why}; see {folder})")
        else:
            self._tell(f"the best plan for these requests gains {answer.gain:+.0%}, too little to propose ({why})")

    def _tell(self, note: str) -> None:
        self._note = note
        self._tell_someone(note)


def _say_state(state: DriftState) -> str:
    return "requests are as planned for" if state is DriftState.STABLE else "requests may have changed"


def _say_strongest(changes: tuple[Change, ...]) -> str:
    change = max(changes, key=lambda change: change.strength)
    return f"{change.name} {change.planned:.3g} -> {change.live:.3g}"

"""When to plan again: the workload has drifted, the drift lasts, and a new plan gains enough.

                drifted                   some windows in a row
    STABLE --------------> SUSPECT ------------------------------> REPLANNING
      ^  ^  not drifted      |                                      |      |
      |  +-------------------+                     enough gain      |      |  too little gain, or no plan
      |                                                             v      |
      |                                            +---------- PROPOSED    |
      |                  workload as planned, or a |                |      |
      |                  third workload            |                |      |
      |                                            v                |      |
      +------------------------------------------ COOLING <---------|------+
                     the cool-down is over                          |
                                                  stays while the workload is the one of the proposal

Hysteresis has four parts. A change must last for several windows, at its start and at its end, and must hold for the
pooled windows: two alternating workloads are one mixture. The new plan is for the pooled windows. Drift starts at
strength 1 and ends below `exit_strength`. No planning starts during a cool-down. A workload for which a new plan gained
too little is not planned for again.

After a proposal that was soon withdrawn, and after planning without a proposal, the cool-down and the number of windows
before planning double, up to `max_backoff` times. A proposal that lasts resets them. So fast alternation causes one
proposal, and slow alternation causes a proposal each time.

Times are arguments, in seconds of one clock.
"""

from dataclasses import dataclass
from enum import Enum

from tandem.core.replanning import DriftState, WorkloadChange
from tandem.placement.replanning.workload_distance import DriftThresholds, WorkloadStats, compare, strength


@dataclass(frozen=True, slots=True)
class DriftPolicy:
    """`min_gain` is relative. A proposal withdrawn within `short_lived_s` increases the backoff. An outdated proposal
    does no harm, so withdrawing takes more windows than proposing."""

    confirm_windows: int = 3
    withdraw_windows: int = 6
    exit_strength: float = 0.7
    min_gain: float = 0.10
    cool_down_s: float = 1800.0
    short_lived_s: float = 2 * 3600.0
    max_backoff: int = 8


class Decision(Enum):
    NOTHING = "nothing"
    REPLAN = "replan"
    WITHDRAW = "withdraw"


class DriftDetector:
    """The detector of one plan. Receives each window once, in order, and the result of each planning."""

    def __init__(self, planned: WorkloadStats, thresholds: DriftThresholds, policy: DriftPolicy | None = None) -> None:
        self.state = DriftState.STABLE
        self.changes: tuple[WorkloadChange, ...] = ()  # of the last window, compared with the plan
        self._planned = planned
        self._thresholds = thresholds
        self._policy = policy or DriftPolicy()
        self._replanned_for: WorkloadStats | None = None  # the workload of the last planning
        self._no_gain_for: WorkloadStats | None = None  # the workload of the last planning with too little gain
        self._is_drifted = False
        self._windows: list[WorkloadStats] = []  # consecutive windows that are a reason to leave the state
        self._backoff = 1  # factor on the policy's windows and cool-down
        self._proposed_s = 0.0
        self._cool_until_s = 0.0

    @property
    def windows_to_confirm(self) -> int:
        """The current number of consecutive drifted windows before planning starts."""
        return self._policy.confirm_windows * self._backoff

    @property
    def max_windows_to_confirm(self) -> int:
        return self._policy.confirm_windows * self._policy.max_backoff

    def observe(self, live: WorkloadStats, now_s: float) -> Decision:
        """Process one window. REPLAN: the caller plans for the last `windows_to_confirm` windows pooled, then calls
        `record_result`."""
        self.changes = compare(self._planned, live, self._thresholds)
        self._is_drifted = self._strength(live) >= (self._policy.exit_strength if self._is_drifted else 1.0)
        match self.state:
            case DriftState.COOLING if now_s >= self._cool_until_s:
                self._enter(DriftState.STABLE)
                return self._watch(live)
            case DriftState.STABLE | DriftState.SUSPECT:
                return self._watch(live)
            case DriftState.PROPOSED:
                return self._keep_or_withdraw(live, now_s)
        return Decision.NOTHING

    def record_result(self, gain: float | None, now_s: float, *, regains: bool = False) -> bool:
        """The relative gain of the new plan, None if planning failed. `regains`: the new plan meets targets that the
        running plan misses. Returns whether to propose the plan."""
        assert self.state is DriftState.REPLANNING, "planning was requested"
        if gain is not None and (regains or gain >= self._policy.min_gain):
            self._proposed_s = now_s
            self._enter(DriftState.PROPOSED)
            return True
        if gain is not None:
            self._no_gain_for = self._replanned_for
        self._cool(now_s, was_useful=False)
        return False

    def _strength(self, live: WorkloadStats) -> float:
        """Strength of the difference from the planned workload or from the workload without gain: the smaller one."""
        difference = self._difference(self._planned, live)
        return difference if self._no_gain_for is None else min(difference, self._difference(self._no_gain_for, live))

    def _watch(self, live: WorkloadStats) -> Decision:
        if not self._is_drifted:
            self._enter(DriftState.STABLE)
            return Decision.NOTHING
        if self.state is DriftState.STABLE:
            self._enter(DriftState.SUSPECT)
        self._windows.append(live)
        if len(self._windows) < self.windows_to_confirm:
            return Decision.NOTHING
        pooled = WorkloadStats.pooled(self._windows)
        if self._strength(pooled) < self._policy.exit_strength:
            self._windows.clear()
            return Decision.NOTHING
        self._replanned_for = pooled
        self._enter(DriftState.REPLANNING)
        return Decision.REPLAN

    def _keep_or_withdraw(self, live: WorkloadStats, now_s: float) -> Decision:
        if self._fits_proposal(live, is_drifted=self._is_drifted):
            self._windows.clear()
            return Decision.NOTHING
        self._windows.append(live)
        if len(self._windows) < self._policy.withdraw_windows:
            return Decision.NOTHING
        pooled = WorkloadStats.pooled(self._windows)
        if self._fits_proposal(pooled, is_drifted=self._strength(pooled) >= self._policy.exit_strength):
            self._windows.clear()
            return Decision.NOTHING
        self._cool(now_s, was_useful=now_s - self._proposed_s >= self._policy.short_lived_s)
        return Decision.WITHDRAW

    def _fits_proposal(self, live: WorkloadStats, *, is_drifted: bool) -> bool:
        assert self._replanned_for is not None, "a proposal has a workload"
        return is_drifted and self._difference(self._replanned_for, live) < 1.0

    def _difference(self, other: WorkloadStats, live: WorkloadStats) -> float:
        return strength(compare(other, live, self._thresholds))

    def _cool(self, now_s: float, *, was_useful: bool) -> None:
        self._backoff = 1 if was_useful else min(2 * self._backoff, self._policy.max_backoff)
        self._cool_until_s = now_s + self._policy.cool_down_s * self._backoff
        self._enter(DriftState.COOLING)

    def _enter(self, state: DriftState) -> None:
        self.state = state
        self._windows = []

"""When to plan again: the workload has drifted, it stays so, and the answer would be worth something.

                drifted                   `confirm_windows` in a row
    STABLE --------------> SUSPECT ------------------------------> REPLANNING
      ^  ^  not drifted      |                                      |      |
      |  +-------------------+                        worth it      |      |  no better plan, or no plan
      |                                                             v      |
      |                                            +---------- PROPOSED    |
      |                       like the plan again, |                |      |
      |                       or like neither      |                |      |
      |                                            v                |      |
      +------------------------------------------ COOLING <---------|------+
                     the cool-down is over                          |
                                                  stays while requests are like those it is for

Hysteresis has four parts. A change must persist for some windows, to come and to go. It begins at strength 1 and ends
below `leave`. Nothing new begins during a cool-down, which doubles whenever a proposal or a plan has come to nothing
soon, up to a bound. And where planning again gained nothing, requests like those are not planned for again.

Time comes in as an argument, in seconds of any one clock.
"""

from dataclasses import dataclass
from enum import Enum

from core.replanning import Change, DriftState
from placement.workload_distance import Limits, Workload, compare, strength


@dataclass(frozen=True, slots=True)
class DriftPolicy:
    """`min_gain` is relative. A proposal that is withdrawn within `short_lived_s` was for nothing."""

    confirm_windows: int = 3
    leave: float = 0.7
    min_gain: float = 0.10
    cool_down_s: float = 1800.0
    longest_cool_down_s: float = 6 * 3600.0
    short_lived_s: float = 2 * 3600.0


class Decision(Enum):
    NOTHING = "nothing"
    REPLAN = "replan"
    WITHDRAW = "withdraw"


class DriftDetector:
    """Told of each window once, in order, and of what planning brought. One plan, one detector."""

    def __init__(self, planned: Workload, limits: Limits, policy: DriftPolicy | None = None) -> None:
        self.state = DriftState.STABLE
        self.changes: tuple[Change, ...] = ()  # of the last window, compared with the plan
        self._planned = planned
        self._limits = limits
        self._policy = policy or DriftPolicy()
        self._asked: Workload | None = None  # what planning was last begun for
        self._futile: Workload | None = None  # for which planning gained nothing
        self._is_drifted = False
        self._in_a_row = 0  # windows that speak for leaving the state
        self._proposed_s = 0.0
        self._next_cool_down_s = self._policy.cool_down_s
        self._cool_until_s = 0.0

    def observe(self, live: Workload, now_s: float) -> Decision:
        """Judge one window. REPLAN: `answered` is to be called when planning is over."""
        self.changes = compare(self._planned, live, self._limits)
        self._judge(live)
        match self.state:
            case DriftState.COOLING if now_s >= self._cool_until_s:
                self._enter(DriftState.STABLE)
                return self._watch(live)
            case DriftState.STABLE | DriftState.SUSPECT:
                return self._watch(live)
            case DriftState.PROPOSED:
                return self._keep_or_withdraw(live, now_s)
        return Decision.NOTHING

    def answered(self, gain: float | None, now_s: float, *, regains: bool = False) -> bool:
        """Planning is over: its relative gain, None if it failed. Whether the plan is worth proposing: for its gain, or
        because it keeps targets that the one in use misses."""
        assert self.state is DriftState.REPLANNING, "nobody asked"
        if gain is not None and (regains or gain >= self._policy.min_gain):
            self._proposed_s = now_s
            self._enter(DriftState.PROPOSED)
            return True
        if gain is not None:
            self._futile = self._asked
        self._cool(now_s, for_nothing=True)
        return False

    def _judge(self, live: Workload) -> None:
        """Drifted is what is like neither the plan's requests nor those that nothing was gained for."""
        size = strength(self.changes)
        if self._futile is not None:
            size = min(size, self._strength_from(self._futile, live))
        self._is_drifted = size >= (self._policy.leave if self._is_drifted else 1.0)

    def _watch(self, live: Workload) -> Decision:
        if not self._is_drifted:
            self._enter(DriftState.STABLE)
            return Decision.NOTHING
        if self.state is DriftState.STABLE:
            self._enter(DriftState.SUSPECT)
        self._in_a_row += 1
        if self._in_a_row < self._policy.confirm_windows:
            return Decision.NOTHING
        self._asked = live
        self._enter(DriftState.REPLANNING)
        return Decision.REPLAN

    def _keep_or_withdraw(self, live: Workload, now_s: float) -> Decision:
        assert self._asked is not None, "a proposal is for some workload"
        stays = self._is_drifted and self._strength_from(self._asked, live) < 1.0
        self._in_a_row = 0 if stays else self._in_a_row + 1
        if self._in_a_row < self._policy.confirm_windows:
            return Decision.NOTHING
        self._cool(now_s, for_nothing=now_s - self._proposed_s < self._policy.short_lived_s)
        return Decision.WITHDRAW

    def _strength_from(self, other: Workload, live: Workload) -> float:
        return strength(compare(other, live, self._limits))

    def _cool(self, now_s: float, *, for_nothing: bool) -> None:
        if not for_nothing:
            self._next_cool_down_s = self._policy.cool_down_s
        self._cool_until_s = now_s + self._next_cool_down_s
        if for_nothing:
            self._next_cool_down_s = min(2 * self._next_cool_down_s, self._policy.longest_cool_down_s)
        self._enter(DriftState.COOLING)

    def _enter(self, state: DriftState) -> None:
        self.state = state
        self._in_a_row = 0

"""When to plan again: the workload has drifted, it stays so, and the answer would be worth something.

                drifted                   some windows in a row
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

Hysteresis has four parts. A change must persist for some windows, to come and to go, and hold for all of them together,
so that two kinds of requests in turns are one mixture; planning is for these windows together. It begins at strength 1
and ends below `leave`. Nothing new begins during a cool-down. And where planning again gained nothing, requests like
those are not planned for again.

Whenever a proposal or a plan soon came to nothing, the cool-down and the windows that it takes to plan are doubled, up
to `most_patience` times; a proposal that lasts makes them short again. So what alternates fast is answered once, and
what alternates slowly is followed.

Time comes in as an argument, in seconds of any one clock.
"""

from dataclasses import dataclass
from enum import Enum

from tandem.core.replanning import Change, DriftState
from tandem.placement.replanning.workload_distance import Limits, Workload, compare, strength


@dataclass(frozen=True, slots=True)
class DriftPolicy:
    """`min_gain` is relative. A proposal that is withdrawn within `short_lived_s` was for nothing. One that stands does
    no harm, so that withdrawing takes more windows than proposing."""

    confirm_windows: int = 3
    withdraw_windows: int = 6
    leave: float = 0.7
    min_gain: float = 0.10
    cool_down_s: float = 1800.0
    short_lived_s: float = 2 * 3600.0
    most_patience: int = 8


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
        self._in_a_row: list[Workload] = []  # windows that speak for leaving the state
        self._patience = 1  # times the policy's windows and cool-down
        self._proposed_s = 0.0
        self._cool_until_s = 0.0

    @property
    def windows_to_confirm(self) -> int:
        """How many windows in a row it takes, now, to begin planning."""
        return self._policy.confirm_windows * self._patience

    @property
    def most_windows_to_confirm(self) -> int:
        return self._policy.confirm_windows * self._policy.most_patience

    def observe(self, live: Workload, now_s: float) -> Decision:
        """Judge one window. REPLAN: planning is to begin for the last `windows_to_confirm` windows together, and
        `answered` to be called when it is over."""
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
        self._cool(now_s, came_to_nothing=True)
        return False

    def _judge(self, live: Workload) -> None:
        self._is_drifted = self._size(live) >= (self._policy.leave if self._is_drifted else 1.0)

    def _size(self, live: Workload) -> float:
        """How far it is from what the plan was made for, or from what nothing was gained for, whichever is nearer."""
        size = self._strength_from(self._planned, live)
        return size if self._futile is None else min(size, self._strength_from(self._futile, live))

    def _watch(self, live: Workload) -> Decision:
        if not self._is_drifted:
            self._enter(DriftState.STABLE)
            return Decision.NOTHING
        if self.state is DriftState.STABLE:
            self._enter(DriftState.SUSPECT)
        self._in_a_row.append(live)
        if len(self._in_a_row) < self.windows_to_confirm:
            return Decision.NOTHING
        together = Workload.pooled(self._in_a_row)
        if self._size(together) < self._policy.leave:
            self._in_a_row.clear()
            return Decision.NOTHING
        self._asked = together
        self._enter(DriftState.REPLANNING)
        return Decision.REPLAN

    def _keep_or_withdraw(self, live: Workload, now_s: float) -> Decision:
        if self._suits_proposal(live, is_drifted=self._is_drifted):
            self._in_a_row.clear()
            return Decision.NOTHING
        self._in_a_row.append(live)
        if len(self._in_a_row) < self._policy.withdraw_windows:
            return Decision.NOTHING
        together = Workload.pooled(self._in_a_row)
        if self._suits_proposal(together, is_drifted=self._size(together) >= self._policy.leave):
            self._in_a_row.clear()
            return Decision.NOTHING
        self._cool(now_s, came_to_nothing=now_s - self._proposed_s < self._policy.short_lived_s)
        return Decision.WITHDRAW

    def _suits_proposal(self, live: Workload, *, is_drifted: bool) -> bool:
        assert self._asked is not None, "a proposal is for some workload"
        return is_drifted and self._strength_from(self._asked, live) < 1.0

    def _strength_from(self, other: Workload, live: Workload) -> float:
        return strength(compare(other, live, self._limits))

    def _cool(self, now_s: float, *, came_to_nothing: bool) -> None:
        self._patience = min(2 * self._patience, self._policy.most_patience) if came_to_nothing else 1
        self._cool_until_s = now_s + self._policy.cool_down_s * self._patience
        self._enter(DriftState.COOLING)

    def _enter(self, state: DriftState) -> None:
        self.state = state
        self._in_a_row = []

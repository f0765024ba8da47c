"""Whether a running plan still fits its workload: `tandem serve` decides, `tandem status` and metrics show it."""

from dataclasses import dataclass
from enum import Enum


class DriftState(Enum):
    """See the state diagram in `placement/replanning/drift.py`."""

    STABLE = "stable"
    SUSPECT = "suspect"
    REPLANNING = "replanning"
    PROPOSED = "proposed"
    COOLING = "cooling"


@dataclass(frozen=True, slots=True)
class WorkloadChange:
    """A difference between the live and the planned workload. `strength` is its size divided by the threshold, 0 if the
    difference is not significant; from 1 on, the plan may be wrong. `planned` and `live` are means in the unit of the
    name."""

    name: str  # rate, prompt_tokens, output_tokens, cached_share
    planned: float
    live: float
    strength: float


@dataclass(frozen=True, slots=True)
class Proposal:
    """A new plan for the live workload.

    `gain` is relative: goodput per device, or cost for the same rate. `changes` are sentences about instances to add
    and to remove. `folder` has the plan, its report, its SLO file and its workload.
    """

    summary: str
    changes: tuple[str, ...]
    gain: float
    folder: str


@dataclass(frozen=True, slots=True)
class ReplanStatus:
    """`changes` compare the last window with the plan. `note` is the last event in one sentence."""

    state: DriftState
    changes: tuple[WorkloadChange, ...] = ()
    note: str = ""
    proposal: Proposal | None = None

    @property
    def drift(self) -> float:
        """Strength of the strongest change."""
        return max((change.strength for change in self.changes), default=0.0)

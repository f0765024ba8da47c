"""Whether a running plan still fits its requests: what `tandem serve` decides, and `tandem status` and metrics show."""

from dataclasses import dataclass
from enum import Enum


class DriftState(Enum):
    """See the picture in `placement/replanning/drift.py`."""

    STABLE = "stable"
    SUSPECT = "suspect"
    REPLANNING = "replanning"
    PROPOSED = "proposed"
    COOLING = "cooling"


@dataclass(frozen=True, slots=True)
class Change:
    """One way in which requests differ from those planned for. `strength` is its size in units of what matters, 0 where
    chance explains it: from 1 on, the plan may be wrong. `planned` and `live` are means, in the unit of the name."""

    name: str  # rate, prompt_tokens, output_tokens, cached_share
    planned: float
    live: float
    strength: float


@dataclass(frozen=True, slots=True)
class Proposal:
    """Another plan for the requests as they are now.

    `gain` is relative: goodput per device, or cost for the same rate. `changes` are sentences: which instances would
    come and go. `folder` has the plan, its report, and the SLO file and lengths that it answers.
    """

    summary: str
    changes: tuple[str, ...]
    gain: float
    folder: str


@dataclass(frozen=True, slots=True)
class ReplanStatus:
    """`changes` compare the last judged window with the plan. `note` is the last event in one sentence."""

    state: DriftState
    changes: tuple[Change, ...] = ()
    note: str = ""
    proposal: Proposal | None = None

    @property
    def drift(self) -> float:
        """Strength of the strongest change."""
        return max((change.strength for change in self.changes), default=0.0)

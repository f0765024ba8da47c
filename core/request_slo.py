"""The targets of one request. Without pydantic, because clients import this module."""

import math
from dataclasses import dataclass
from typing import Literal

DEFAULT_CLASS = "default"
CUSTOM_CLASS = "custom"  # targets of the request's own
NO_CLASS = "none"

_MAX_GAP_TPOTS = 4.0

IfUnmet = Literal["demote", "refuse"]


@dataclass(frozen=True, slots=True)
class RequestSlo:
    """The targets of one request. An infinite target means none.

    `ttft_s` runs from the request's arrival at the router to its first token, `tpot_s` is the mean time per output
    token after the first (`core.timeline`). `weight`, `priority`, `if_unmet` and `max_gap_s` are those of its class.
    """

    name: str = NO_CLASS
    ttft_s: float = math.inf
    tpot_s: float = math.inf
    weight: float = 1.0
    priority: int = 0
    if_unmet: IfUnmet = "demote"
    max_gap_s: float | None = None

    @property
    def longest_gap_s(self) -> float:
        """The longest gap between two tokens that instances plan with the policy slack, so that saved time is not spent
        in one gap."""
        return _MAX_GAP_TPOTS * self.tpot_s if self.max_gap_s is None else self.max_gap_s

    @property
    def has_targets(self) -> bool:
        return self.ttft_s < math.inf or self.tpot_s < math.inf

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the finite targets: "ttft", "tpot"."""
        return tuple(name for name, target_s in (("ttft", self.ttft_s), ("tpot", self.tpot_s)) if target_s < math.inf)

    def missed(self, ttft_s: float, tpot_s: float) -> tuple[str, ...]:
        """Names of the targets that these times exceed: "ttft", "tpot"."""
        times = (("ttft", ttft_s, self.ttft_s), ("tpot", tpot_s, self.tpot_s))
        return tuple(name for name, time_s, target_s in times if time_s > target_s)


NO_SLO = RequestSlo()
"""The targets of a best-effort request: none."""

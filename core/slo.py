"""Service level objectives: the targets that a request must meet to count towards goodput.

A class of requests is declared in a file (`SloClass`). A client asks for a class or for targets of its own
(`RequestedSlo`); what it gets is a `core.request_slo.RequestSlo`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

from tandem.core.errors import InvalidRequestError
from tandem.core.frozen_model import FrozenModel, WrongSetting
from tandem.core.request_slo import CUSTOM_CLASS, DEFAULT_CLASS, NO_CLASS, NO_SLO, IfUnmet, RequestSlo
from tandem.core.sampling_ranges import check_range

_RESERVED = (CUSTOM_CLASS, NO_CLASS)

MAX_CLASSES = 64
MAX_TARGET_S = 86_400.0
"""A day. A target beyond it is a mistake, such as milliseconds that were given as seconds."""


Target = Annotated[float, Field(gt=0, le=MAX_TARGET_S, allow_inf_nan=False)]


def _check_name(name: str) -> str:
    if name in _RESERVED:
        raise ValueError(f"{name} is what metrics call requests without a class; give the class another name")
    return name


class SloClass(FrozenModel):
    """Targets of one class of requests. `attainment` is the share of its requests that must meet both targets."""

    name: Annotated[str, AfterValidator(_check_name)] = Field(
        default=DEFAULT_CLASS,
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Name of the class in requests, metrics and reports; requests that name none are of class default",
    )
    ttft_s: Target = Field(description="Time to first token, seconds")
    tpot_s: Target = Field(description="Time per output token after the first, seconds")
    attainment: float = Field(default=0.9, gt=0, le=1, description="Share of requests that must meet both targets")
    share: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Planned share of the traffic, relative to other classes"
    )
    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Worth of one of its requests, relative to other classes"
    )
    priority: int = Field(
        default=0, ge=-1000, le=1000, description="Waiting requests of higher priority are dispatched first"
    )
    if_unmet: IfUnmet = Field(
        default="demote",
        description="What becomes of a request that cannot meet its targets: best effort (demote), or 429 (refuse)",
    )

    max_gap_s: Target | None = Field(
        default=None,
        description="Longest gap between two tokens that instances with the policy slack plan for, seconds "
        "(default: 4 * tpot_s)",
    )

    @property
    def request_slo(self) -> RequestSlo:
        return RequestSlo(
            self.name, self.ttft_s, self.tpot_s, self.weight, self.priority, self.if_unmet, self.max_gap_s
        )


def _check_unique(classes: tuple[SloClass, ...]) -> tuple[SloClass, ...]:
    names = [slo.name for slo in classes]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise WrongSetting((index,), f"two SLO classes are called {name!r}; give each class a name")
    return classes


SloClasses = Annotated[tuple[SloClass, ...], AfterValidator(_check_unique), Field(max_length=MAX_CLASSES)]


@dataclass(frozen=True, slots=True)
class RequestedSlo:
    """A client's wish: the name of a class, its own targets, or nothing."""

    name: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None

    def resolve(self, classes: Sequence[SloClass]) -> RequestSlo:
        """The targets on a router with these classes. A request without a wish is of class default, if there is one.

        Raises InvalidRequestError for an unknown class, for a target that is not a positive number of at most
        MAX_TARGET_S, and for a class together with targets.
        """
        has_targets = self.ttft_s is not None or self.tpot_s is not None
        if self.name and has_targets:
            raise InvalidRequestError("Give an SLO class or targets of your own, not both.", param="slo")
        if has_targets:
            for name, target_s in (("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s)):
                if target_s is not None:
                    check_range(name, target_s, 0.0, MAX_TARGET_S, above_low=True)
            return RequestSlo(
                CUSTOM_CLASS,
                math.inf if self.ttft_s is None else self.ttft_s,
                math.inf if self.tpot_s is None else self.tpot_s,
            )
        for slo in classes:
            if slo.name == (self.name or DEFAULT_CLASS):
                return slo.request_slo
        if self.name:
            known = ", ".join(slo.name for slo in classes) or "none"
            shown = self.name if len(self.name) <= 64 else f"{self.name[:64]}..."
            raise InvalidRequestError(
                f"Invalid 'slo': there is no SLO class '{shown}'; the classes of this server: {known}.", param="slo"
            )
        return NO_SLO


UNSPECIFIED_SLO = RequestedSlo()
"""The wish of a request that names neither a class nor targets."""

"""Service level objectives: the targets that a request must meet to count towards goodput."""

from pydantic import Field

from tandem.core.frozen_model import FrozenModel


class SloClass(FrozenModel):
    """Targets of one class of requests. `attainment` is the share of its requests that must meet both targets."""

    name: str = Field(default="default", min_length=1, description="Name of the class in requests and reports")
    ttft_s: float = Field(gt=0, description="Time to first token, seconds")
    tpot_s: float = Field(gt=0, description="Time per output token after the first, seconds")
    attainment: float = Field(default=0.9, gt=0, le=1, description="Share of requests that must meet both targets")
    share: float = Field(default=1.0, gt=0, description="Share of the traffic, relative to the other classes")

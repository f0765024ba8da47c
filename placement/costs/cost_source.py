"""The interface between the planner and its sources of costs."""

from typing import Protocol

from tandem.core.cost_model import CostModel
from tandem.core.parallel import ParallelShape

MAX_BATCH = 1024
"""The most sequences in a step of a plan, if memory holds their KV; vLLM's default on large devices."""


class CostSource(Protocol):
    """Step costs and KV capacity of one model's instances. Devices have the names of the cluster. Pure."""

    def cost_model(self, device: str, shape: ParallelShape) -> CostModel | None:
        """None if the shape is not legal for the model or its cost is unknown."""
        ...

    def kv_tokens(self, device: str, shape: ParallelShape) -> int:
        """KV tokens that fit one instance beside weights and activations; 0 if the weights do not fit."""
        ...

    @property
    def error(self) -> float:
        """Relative error of predicted step times on measurements outside the fit; NaN if unknown."""
        ...

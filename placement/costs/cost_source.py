"""Where a planner's numbers come from: what an instance of some shape costs, and what it can hold."""

from typing import Protocol

from tandem.core.cost_model import CostModel
from tandem.core.parallel import ParallelShape


class CostSource(Protocol):
    """Answers for one model. Devices are named as in the cluster. Pure: the same question, the same answer."""

    def cost_model(self, device: str, shape: ParallelShape) -> CostModel | None:
        """None where the shape is not legal for the model, or nothing is known of it."""
        ...

    def kv_tokens(self, device: str, shape: ParallelShape) -> int:
        """Tokens whose KV fits one instance beside weights and activations; 0 if the weights alone do not fit."""
        ...

    @property
    def error(self) -> float:
        """Relative error of a step's predicted time, as measured on data that was not fitted; NaN if nobody did."""
        ...

"""What every model offers to the runner."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tandem.engine.ops.interface import AttentionMeta


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's new tokens, packed: `token_ids`, `positions`, `slots` int64 [tokens] on the device.

    `rows` int64 names the packed rows whose hidden states somebody wants, in ascending order; None means all. Of a
    long prompt that is the last one only, which spares the last layer most of its work.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    meta: AttentionMeta
    rows: Tensor | None = None


class Model(Protocol):
    def forward(self, batch: StepBatch, pool: Tensor) -> Tensor:
        """Compute the new tokens and write their KV into `pool`. Returns the hidden states [rows, hidden] wanted."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] of `forward` -> float32 [rows, vocab]"""
        ...

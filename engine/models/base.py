"""The interface between the engine and a model."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tandem.engine.ops.interface import AttentionMeta


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step's new tokens, packed: `token_ids`, `positions`, `slots` int64 [tokens] on the device.

    `rows` int64 [rows] selects the packed rows whose hidden states are wanted, in the order of the step's slices; None
    means all as they are packed. A prompt needs its last row only, which saves most of the last layer's work.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    meta: AttentionMeta
    rows: Tensor | None = None


class Model(Protocol):
    def forward(self, batch: StepBatch, pool: Tensor) -> Tensor:
        """Compute the batch and write its KV to `pool`, of `KvLayout.shape`. Returns hidden states [rows, hidden]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden], as returned by `forward`, -> float32 [rows, vocab]"""
        ...

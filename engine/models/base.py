"""The interface between the engine and a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tandem.engine.collectives.interface import Collectives
from tandem.engine.ops.interface import AttentionMeta, Ops
from tandem.engine.shard import Shard

LayerHook = Callable[[int], None]  # called with the number of layers whose KV of the step is in the pool


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
    """One rank's part of a model, as its `Shard` says."""

    def forward(
        self, batch: StepBatch, pool: Tensor, received: Tensor | None, layer_computed: LayerHook | None = None
    ) -> Tensor:
        """Compute the batch and write its KV to `pool`, of the rank's `KvLayout.shape`.

        `layer_computed` is called once a layer, when all ranks of the stage have written (on CUDA: enqueued) its KV.
        `received` [tokens, hidden] is the result of the stage before; None on the first stage. It may be overwritten.
        Returns hidden states [rows, hidden] on the last stage, else [tokens, hidden] for the next stage.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden], as returned by `forward` on the last stage, -> float32 [rows, tokens of `Shard.vocab`]"""
        ...


def embed(
    token_ids: Tensor, embedding: Tensor, vocab_size: int, shard: Shard, ops: Ops, collectives: Collectives
) -> Tensor:
    """int64 [tokens] -> [tokens, hidden], of which each rank of the stage has the rows `shard.vocab`."""
    if len(shard.vocab) == vocab_size:
        return ops.embedding(token_ids, embedding)
    rows = token_ids - shard.vocab.start
    elsewhere = (rows < 0) | (rows >= len(shard.vocab))
    x = ops.embedding(rows.masked_fill_(elsewhere, 0), embedding)
    return collectives.all_reduce(x.masked_fill_(elsewhere.unsqueeze(1), 0.0))

"""The interface between the engine and a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tandem.engine.collectives.interface import Collectives
from tandem.engine.ops.interface import AttentionMeta, Ops
from tandem.engine.shard import Shard
from tandem.engine.weights import WeightLoader

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


class LayerMatrices:
    """Reads this rank's parts of one layer's matrices, whose names begin with `prefix`. Raises CheckpointError."""

    def __init__(self, loader: WeightLoader, shard: Shard, prefix: str, hidden_size: int) -> None:
        self._loader = loader
        self._shard = shard
        self._prefix = prefix
        self._hidden_size = hidden_size

    def by_outputs(
        self, names: Sequence[str], rows: Sequence[int], of: Sequence[range], biased: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Matrices [rows[i], hidden], of each the rows `of[i]`, stacked, and their biases: the rank computes some
        outputs."""
        weight = self._loader.take_stacked(self._full(names, "weight"), rows, self._hidden_size, of=of)
        return weight, self._loader.take_stacked(self._full(names, "bias"), rows, of=of) if biased else None

    def by_inputs(self, name: str, columns: int, of: range, biased: bool) -> tuple[Tensor, Tensor | None]:
        """The columns `of` of a matrix [hidden, columns], and its bias: the rank has some inputs, and the stage sums
        the results. One rank adds the bias; the others only check it."""
        weight = self._loader.take(f"{self._prefix}.{name}.weight", self._hidden_size, columns, columns=of)
        bias = self._loader.take(f"{self._prefix}.{name}.bias", self._hidden_size) if biased else None
        return weight, bias if self._shard.adds_biases else None

    def _full(self, names: Sequence[str], kind: str) -> list[str]:
        return [f"{self._prefix}.{name}.{kind}" for name in names]

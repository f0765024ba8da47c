"""Reads a model's tensors from a checkpoint and checks that none is missing, unused or of a wrong shape."""

import logging
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from tandem.core.checkpoint_fields import shown
from tandem.core.errors import CheckpointError
from tandem.engine.checkpoint import Checkpoint
from tandem.engine.shard import Shard

_log = logging.getLogger(__name__)
_HEAD = "lm_head.weight"
# Buffers that old versions of transformers saved; the engine computes them from the configuration.
_HARMLESS = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias|attn\.bias)$")


class WeightLoader:
    """Returns tensors in `dtype` on `device`. Every failure is a CheckpointError."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self.device = device
        self._taken: set[str] = set()

    def take(self, name: str, *shape: int, rows: range | None = None, columns: range | None = None) -> Tensor:
        """The tensor `name`, which must exist, have exactly this shape, and hold finite numbers only.

        Of these `rows` and `columns`, if given; only they are read from the file.
        """
        entry = self._checkpoint.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self._checkpoint.path}: tensor '{name}' is missing")
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor '{name}' has shape {list(entry.shape)}, config.json asks for {list(shape)}"
            )
        if not entry.dtype.is_floating_point:
            raise CheckpointError(f"{entry.file}: tensor '{name}' holds {entry.dtype}, which is not a float type")
        self._taken.add(name)
        # Always a copy: the weights must not change when the file is overwritten.
        tensor = self._checkpoint.read(name, rows, columns).to(device=self.device, dtype=self._dtype, copy=True)
        if not torch.stack(tensor.aminmax()).isfinite().all():  # a NaN anywhere is the smallest and the largest
            dtype = str(self._dtype).removeprefix("torch.")
            raise CheckpointError(f"{entry.file}: tensor '{name}' holds values that are not finite numbers in {dtype}")
        return tensor

    def take_stacked(self, names: Sequence[str], rows: Sequence[int], *rest: int, of: Sequence[range]) -> Tensor:
        """Tensors [rows[i], *rest], of each the rows `of[i]`, concatenated to [sum of their lengths, *rest]."""
        parts = zip(names, rows, of, strict=True)
        return torch.cat([self.take(name, count, *rest, rows=wanted) for name, count, wanted in parts])

    def take_embeddings(
        self, name: str, vocab_size: int, hidden_size: int, tied: bool, shard: Shard
    ) -> tuple[Tensor | None, Tensor | None]:
        """The embedding `name` and the output matrix, of both the rows `shard.vocab`: [rows, hidden]. None on stages
        without an embedding or an output matrix.

        If `tied`, one of them may be missing from the file and is then the other. If the file has both with different
        values, they are used, in spite of `tie_word_embeddings`, as in transformers.
        """
        tensors = self._checkpoint.tensors
        embedding_name = _HEAD if tied and name not in tensors and _HEAD in tensors else name
        head_name = name if tied and _HEAD not in tensors else _HEAD

        def take(wanted: str) -> Tensor:
            return self.take(wanted, vocab_size, hidden_size, rows=shard.vocab)

        self.leave(embedding_name)
        self.leave(head_name)
        embedding = take(embedding_name) if shard.is_first_stage else None
        if not shard.is_last_stage:
            return embedding, None
        if embedding is None:
            return None, take(head_name)
        if head_name == embedding_name:
            return embedding, embedding
        head = take(head_name)
        if tied and head.equal(embedding):
            return embedding, embedding
        if tied:
            _log.warning("%s is used, though config.json ties it to %s: their values differ", _HEAD, name)
        return embedding, head

    def leave(self, prefix: str) -> None:
        """Skip the tensors whose names begin with `prefix`: they belong to other stages, which check them."""
        self._taken.update(name for name in self._checkpoint.tensors if name.startswith(prefix))

    def finish(self) -> None:
        """Raises CheckpointError if the model does not use all tensors: the checkpoint belongs to another model."""
        for name, entry in self._checkpoint.tensors.items():
            if name not in self._taken and not _HARMLESS.search(name):
                raise CheckpointError(
                    f"{entry.file}: tensor {shown(name)} is not part of a {self._checkpoint.spec.architecture}"
                )

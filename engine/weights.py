"""Reads a model's tensors from a checkpoint and checks that none is missing, unused or of a wrong shape."""

import logging
import re

import torch
from torch import Tensor

from tandem.core.config_fields import shown
from tandem.core.errors import CheckpointError
from tandem.engine.checkpoint import Checkpoint

_log = logging.getLogger(__name__)
_HEAD = "lm_head.weight"
# Buffers that old versions of transformers saved; the engine computes them from the configuration.
_HARMLESS = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias|attn\.bias)$")


class WeightLoader:
    """Returns tensors in `dtype` on `device`. Every failure is a CheckpointError."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._taken: set[str] = set()

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor `name`, which must exist, have exactly this shape, and hold finite numbers only."""
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
        tensor = self._checkpoint.read(name).to(device=self._device, dtype=self._dtype, copy=True)
        if not torch.stack(tensor.aminmax()).isfinite().all():  # a NaN anywhere is the smallest and the largest
            dtype = str(self._dtype).removeprefix("torch.")
            raise CheckpointError(f"{entry.file}: tensor '{name}' holds values that are not finite numbers in {dtype}")
        return tensor

    def take_stacked(self, names: list[str], rows: list[int], *rest: int) -> Tensor:
        """Tensors [rows[i], *rest] concatenated to [sum(rows), *rest]."""
        return torch.cat([self.take(name, count, *rest) for name, count in zip(names, rows, strict=True)])

    def take_embeddings(self, name: str, vocab_size: int, hidden_size: int, tied: bool) -> tuple[Tensor, Tensor]:
        """The embedding `name` and the output matrix, both [vocab, hidden].

        If `tied`, one of them may be missing and is then the other. A file that has both, with different values, is
        believed more than `tie_word_embeddings`, as transformers does.
        """
        tensors = self._checkpoint.tensors
        if tied and name not in tensors and _HEAD in tensors:
            head = self.take(_HEAD, vocab_size, hidden_size)
            return head, head
        embedding = self.take(name, vocab_size, hidden_size)
        if tied and _HEAD not in tensors:
            return embedding, embedding
        head = self.take(_HEAD, vocab_size, hidden_size)
        if tied and head.equal(embedding):
            return embedding, embedding
        if tied:
            _log.warning("%s is used, though config.json ties it to %s: their values differ", _HEAD, name)
        return embedding, head

    def finish(self) -> None:
        """Refuse a checkpoint with tensors that the model would ignore: it belongs to another model."""
        for name, entry in self._checkpoint.tensors.items():
            if name not in self._taken and not _HARMLESS.search(name):
                raise CheckpointError(
                    f"{entry.file}: tensor {shown(name)} is not part of a {self._checkpoint.spec.architecture}"
                )

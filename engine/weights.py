"""Reads a model's tensors from a checkpoint and checks that none is missing, unused or of a wrong shape."""

import re

import torch
from torch import Tensor

from tandem.core.errors import CheckpointError
from tandem.engine.checkpoint import Checkpoint

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
        """The tensor `name`, which must exist and have exactly this shape."""
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
        return self._checkpoint.read(name).to(device=self._device, dtype=self._dtype, copy=True)

    def take_stacked(self, names: list[str], rows: list[int], *rest: int) -> Tensor:
        """Tensors [rows[i], *rest] concatenated to [sum(rows), *rest]."""
        return torch.cat([self.take(name, count, *rest) for name, count in zip(names, rows, strict=True)])

    def take_head(self, embedding: Tensor, tied: bool) -> Tensor:
        """The output matrix [vocab, hidden]: `embedding` if `tied`, and the checkpoint may then have another one."""
        if tied:
            self._taken.add("lm_head.weight")
            return embedding
        return self.take("lm_head.weight", *embedding.shape)

    def finish(self) -> None:
        """Refuse a checkpoint with tensors that the model would ignore: it belongs to another model."""
        for name, entry in self._checkpoint.tensors.items():
            if name not in self._taken and not _HARMLESS.search(name):
                raise CheckpointError(
                    f"{entry.file}: tensor '{name}' is not part of a {self._checkpoint.spec.architecture}"
                )

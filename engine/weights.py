"""Takes a model's tensors out of a checkpoint one by one, and in the end knows that none was missing or left over."""

import re

import torch
from torch import Tensor

from tandem.core.errors import CheckpointError
from tandem.engine.checkpoint import Checkpoint

# Buffers that old versions of transformers saved, and that are computed from the configuration.
_HARMLESS = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias|attn\.bias)$")


class WeightLoader:
    """Hands out tensors in the engine's dtype and on its device. Every failure is a CheckpointError."""

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
        # A copy even where nothing changes: the weights must not depend on a file that someone may overwrite.
        return self._checkpoint.read(name).to(device=self._device, dtype=self._dtype, copy=True)

    def take_stacked(self, names: list[str], rows: list[int], *rest: int) -> Tensor:
        """Several tensors [rows_i, *rest], one below the other."""
        return torch.cat([self.take(name, count, *rest) for name, count in zip(names, rows, strict=True)])

    def skip(self, name: str) -> None:
        """Accept that the checkpoint may have a tensor that the model does not need."""
        self._taken.add(name)

    def finish(self) -> None:
        """Refuse a checkpoint with tensors that the model would ignore: it is then another model."""
        for name, entry in self._checkpoint.tensors.items():
            if name not in self._taken and not _HARMLESS.search(name):
                raise CheckpointError(
                    f"{entry.file}: tensor '{name}' is not part of a {self._checkpoint.spec.architecture}"
                )

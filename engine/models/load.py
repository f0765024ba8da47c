"""Loads a checkpoint into the model class of its family."""

import torch

from tandem.engine.checkpoint import Checkpoint
from tandem.engine.models.base import Model
from tandem.engine.models.llama import load_llama
from tandem.engine.models.opt import load_opt
from tandem.engine.ops.interface import Ops
from tandem.engine.weights import WeightLoader


def load_model(checkpoint: Checkpoint, ops: Ops, dtype: torch.dtype, device: torch.device, max_positions: int) -> Model:
    """Weights are in `dtype` on `device`, packed by `ops`. Raises CheckpointError."""
    loader = WeightLoader(checkpoint, dtype, device)
    spec = checkpoint.spec
    model: Model = load_opt(spec, loader, ops) if spec.family == "opt" else load_llama(spec, loader, ops, max_positions)
    loader.finish()
    return model

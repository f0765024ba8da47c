"""Which implementation of `Ops` a process uses."""

import torch

from core.errors import ConfigError
from engine.ops.interface import Ops
from engine.ops.torch_ops import TorchOps


def choose_ops(name: str, dtype: torch.dtype, device: torch.device, num_threads: int) -> Ops:
    """Raises ConfigError for a name that is not known, or that cannot be had here."""
    if name not in ("auto", "torch", "native"):
        raise ConfigError(f"The ops '{name}' are not known; use auto, torch or native")
    return TorchOps(dtype)

"""Which implementation of `Ops` a process uses."""

import logging

import torch

from tandem.core.errors import ConfigError
from tandem.engine.ops.interface import Ops
from tandem.engine.ops.native_library import NativeUnavailableError, load_native_library
from tandem.engine.ops.native_ops import MAX_HEAD_DIM, NativeOps
from tandem.engine.ops.torch_ops import TorchOps

_log = logging.getLogger(__name__)


def choose_ops(name: str, dtype: torch.dtype, device: torch.device, head_dim: int, num_threads: int) -> Ops:
    """ "auto" takes the native kernels wherever they can be had, and says in the log why they cannot.

    Raises ConfigError for a name that is not known, and for "native" where that cannot be had.
    """
    if name not in ("auto", "torch", "native"):
        raise ConfigError(f"The ops '{name}' are not known; use auto, torch or native")
    if name == "torch":
        return TorchOps(dtype)
    try:
        return _native_ops(device, head_dim, num_threads)
    except NativeUnavailableError as error:
        if name == "native":
            raise ConfigError(f"Native ops cannot be used: {error}") from error
        _log.info("computing with torch ops: %s", error)
        return TorchOps(dtype)


def _native_ops(device: torch.device, head_dim: int, num_threads: int) -> Ops:
    if device.type != "cpu":
        raise NativeUnavailableError(f"they are for CPUs, not for {device.type}")
    if head_dim > MAX_HEAD_DIM:
        raise NativeUnavailableError(f"they know heads of at most {MAX_HEAD_DIM} elements, not {head_dim}")
    return NativeOps(load_native_library(), num_threads)

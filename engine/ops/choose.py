"""Chooses the implementation of `Ops` for an engine."""

import logging

import torch

from tandem.core.errors import ConfigError
from tandem.engine.ops.interface import HeadShape, Ops
from tandem.engine.ops.native_library import NativeUnavailableError, load_native_library
from tandem.engine.ops.native_ops import MAX_HEAD_DIM, MAX_HEADS_PER_KV_HEAD, NativeOps
from tandem.engine.ops.torch_ops import TorchOps

_log = logging.getLogger(__name__)


def choose_ops(name: str, dtype: torch.dtype, device: torch.device, heads: HeadShape, num_threads: int) -> Ops:
    """`name` "auto" means the native kernels where they can be used, else torch with the reason in the log.

    Raises ConfigError for an unknown name, and for "native" where the native kernels cannot be used.
    """
    if name not in ("auto", "torch", "native"):
        raise ConfigError(f"The ops '{name}' are not known; use auto, torch or native")
    if name == "torch":
        return TorchOps(dtype)
    try:
        return _native_ops(device, heads, num_threads)
    except NativeUnavailableError as error:
        if name == "native":
            raise ConfigError(f"Native ops cannot be used: {error}") from error
        _log.info("computing with torch ops: %s", error)
        return TorchOps(dtype)


def _native_ops(device: torch.device, heads: HeadShape, num_threads: int) -> Ops:
    if device.type != "cpu":
        raise NativeUnavailableError(f"they run on CPUs, not on {device.type}")
    if heads.head_dim > MAX_HEAD_DIM:
        raise NativeUnavailableError(f"they support heads of at most {MAX_HEAD_DIM} elements, not {heads.head_dim}")
    if (shared_by := heads.num_heads // heads.num_kv_heads) > MAX_HEADS_PER_KV_HEAD:
        raise NativeUnavailableError(
            f"they support at most {MAX_HEADS_PER_KV_HEAD} query heads for each key/value head, not {shared_by}"
        )
    return NativeOps(load_native_library(), num_threads)

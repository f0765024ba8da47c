"""Resolves the configuration's device, dtype and number of threads, "auto" included."""

import os
from pathlib import Path

import torch

from tandem.core.errors import ConfigError
from tandem.core.model_spec import ModelSpec

_MAX_THREADS = 1024
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(device: str) -> torch.device:
    """Raises ConfigError for a device that this machine does not have."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"'{device}' is not a device; use auto, cpu, cuda or cuda:<number>") from None
    if chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda":
        raise ConfigError(f"'{device}' is not supported; use auto, cpu, cuda or cuda:<number>")
    if (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"'{device}' is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return chosen


def choose_dtype(dtype: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """The dtype of weights and KV. Raises ConfigError for a dtype that the engine does not support."""
    if dtype == "auto":
        if spec.dtype == "float32" or (device.type == "cpu" and not cpu_multiplies_bf16()):
            return torch.float32
        return torch.bfloat16
    if dtype not in _DTYPES:
        raise ConfigError(f"The dtype '{dtype}' is not supported; use auto, float32 or bfloat16")
    return _DTYPES[dtype]


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions that multiply bf16, by /proc/cpuinfo; False without that file."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return False
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())


def choose_threads(num_threads: int) -> int:
    """0 means the number of cores that this process may use. Raises ConfigError."""
    if not 0 <= num_threads <= _MAX_THREADS:
        raise ConfigError(f"threads must be from 0 to {_MAX_THREADS}, not {num_threads}")
    return num_threads or len(os.sched_getaffinity(0))

"""Configuration and capacity of an engine."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`dtype` of weights and KV: "float32", "bfloat16" or "auto". "auto" is float32 for a float32 checkpoint and for a
    CPU without bf16 instructions (avx512_bf16, AMX), else bfloat16.
    `device`: "cpu", "cuda", "cuda:1" or "auto", which is CUDA where there is a CUDA device.
    `num_threads` 0 means all cores that this process may use. `max_model_len` None means the model's own limit.
    `ops`: "torch", "native" (own CPU kernels, compiled at first use) or "auto", which is native where supported.
    """

    model_path: Path
    dtype: str = "auto"
    device: str = "auto"
    num_threads: int = 0
    kv_memory_bytes: int = 1 << 30
    block_size: int = 16
    max_model_len: int | None = None
    ops: str = "auto"


@dataclass(frozen=True, slots=True)
class Capacity:
    """Size of the KV pool. `max_model_len` is the longest sequence, in tokens, that model and pool allow."""

    num_blocks: int
    block_size: int
    max_model_len: int

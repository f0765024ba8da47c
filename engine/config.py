"""How an engine is to run, and what it can hold."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything `load_engine` needs to know.

    `dtype` of weights and KV: "float32", "bfloat16" or "auto", which is the checkpoint's own where the device
    multiplies bf16 (every CUDA device, CPUs with avx512_bf16 or AMX), else float32.
    `device`: "cpu", "cuda", "cuda:1" or "auto", which is CUDA where there is any.
    `num_threads` 0 means all cores this process may use. `max_model_len` None means the model's own limit.
    `ops`: "torch", "native" (own CPU kernels, compiled on first use) or "auto", which is native where it can be.
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
    """What the KV pool holds. `max_model_len` is the longest sequence, by the model and by the pool."""

    num_blocks: int
    block_size: int
    max_model_len: int

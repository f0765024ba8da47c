"""An engine as a worker needs it: its KV pool where a peer on the same host can read it."""

from functools import partial
from pathlib import Path

import torch

from tandem.core.config import EngineSection
from tandem.engine.config import EngineConfig
from tandem.engine.device import choose_device
from tandem.engine.engine import Engine, load_engine
from tandem.kv_transfer.pool import SharedPool


def load_worker_engine(model: Path, section: EngineSection) -> tuple[Engine, SharedPool]:
    """Load and warm up. Raises CheckpointError or ConfigError."""
    pools: list[SharedPool] = []

    def allocate(device: torch.device, num_bytes: int) -> torch.Tensor:
        pools.append(SharedPool.create(num_bytes, device))
        return pools[0].tensor

    config = EngineConfig(
        model_path=model,
        dtype=section.dtype,
        device=section.device,
        num_threads=section.threads,
        kv_memory_bytes=section.kv_memory,
        block_size=section.block_size,
        max_model_len=section.max_model_len,
        ops=section.ops,
    )
    engine = load_engine(config, partial(allocate, choose_device(section.device)))
    engine.warm_up()
    return engine, pools[0]

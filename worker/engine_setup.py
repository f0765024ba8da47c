"""An engine as a worker needs it: its KV pool where a peer on the same host can read it."""

from core.config import EngineSection, WorkerConfig
from engine.config import EngineConfig
from engine.engine import Engine, load_engine
from kv_transfer.pool import SharedPool


def load_worker_engine(config: WorkerConfig, section: EngineSection) -> tuple[Engine, SharedPool | None]:
    """Load and warm up. The pool is None on a device whose memory cannot be mapped by another process.

    Raises CheckpointError or ConfigError.
    """
    pools: list[SharedPool] = []

    def allocate(num_bytes: int):  # type: ignore[no-untyped-def]
        pools.append(SharedPool.create(num_bytes))
        return pools[0].tensor

    engine_config = EngineConfig(
        model_path=config.model,
        dtype=section.dtype,
        device=section.device,
        num_threads=section.threads,
        kv_memory_bytes=section.kv_memory,
        block_size=section.block_size,
        max_model_len=section.max_model_len,
        ops=section.ops,
    )
    engine = load_engine(engine_config, allocate)
    engine.warm_up()
    return engine, pools[0] if pools else None

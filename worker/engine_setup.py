"""Loads the engine of a worker, with KV pools that other processes of the host can read."""

import logging
from functools import partial
from pathlib import Path

import torch

from tandem.core.config import WorkerConfig
from tandem.core.errors import CheckpointError
from tandem.core.instance_section import EngineSection
from tandem.engine.device import choose_device
from tandem.engine.engine import Engine, load_engine
from tandem.kv_transfer.pool import SharedPool
from tandem.kv_transfer.remote_pool import RemotePool
from tandem.worker.ranks.follower import loaded_rank
from tandem.worker.ranks.group import RankGroup
from tandem.worker.ranks.place import engine_config

log = logging.getLogger(__name__)


def load_worker_engine(
    model: Path, section: EngineSection, ranks: RankGroup | None
) -> tuple[Engine, tuple[SharedPool | RemotePool, ...]]:
    """Load rank 0, wait for the other `ranks`, and warm up. Returns the engine and the KV pools of all ranks, in the
    order of ranks. Raises CheckpointError, ConfigError or RankLostError."""
    own: list[SharedPool] = []
    config = engine_config(model, section) if ranks is None else ranks.engine_config()

    def allocate(device: torch.device, num_bytes: int) -> torch.Tensor:
        own.append(SharedPool.create(num_bytes, device))
        return own[0].tensor

    place = None if ranks is None else ranks.place()
    engine = load_engine(config, partial(allocate, choose_device(config.device)), place)
    others: list[SharedPool | RemotePool] = []
    if ranks is not None:
        ranks.wait_ready(loaded_rank(engine))
        others += ranks.pools(engine.layout)
    engine.warm_up()
    return engine, (*own, *others)


def check_model_files(config: WorkerConfig, weights_hash: str) -> None:
    """Raises CheckpointError if the files have another hash than `model_hash` of the settings, which is the same on all
    hosts of a cluster."""
    log.info("the hash of the files of %s is %s", config.model, weights_hash)
    if config.model_hash is not None and not weights_hash.startswith(config.model_hash):
        raise CheckpointError(
            f"the model files in {config.model} are not those of the cluster: their hash is {weights_hash[:16]}, and "
            f"model_hash is {config.model_hash[:16]}; copy the model to this host again, or correct model_hash"
        )

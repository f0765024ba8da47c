"""Where a rank of an instance computes, and how it meets the other ranks."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._C._distributed_c10d import FileStore

from tandem.core.instance_section import EngineSection
from tandem.core.parallel import ParallelShape
from tandem.engine.collectives.interface import Collectives
from tandem.engine.collectives.process_groups import ProcessGroupCollectives
from tandem.engine.collectives.shared_memory import SharedMemoryCollectives, SharedRegion
from tandem.engine.config import EngineConfig
from tandem.engine.device import choose_device, choose_threads
from tandem.engine.ops.native_library import NativeUnavailableError, load_native_library

_HOST = "127.0.0.1"  # all ranks of an instance are on one host


@dataclass(frozen=True, slots=True)
class MeetingPlace:
    """What all ranks of an instance share: `region`, and the file `store_fd` through which process groups connect, the
    caller's. Like the region it has no name: it vanishes with the last process that has it, however that ends."""

    shape: ParallelShape
    region: SharedRegion
    store_fd: int

    @staticmethod
    def create_store() -> int:
        """A new empty file, closed on exec."""
        return os.memfd_create("tandem-ranks-store", os.MFD_CLOEXEC)

    def collectives(self, rank: int, device: torch.device) -> Collectives:
        """Shared memory between CPUs; NCCL between GPUs; gloo between CPUs where there is no compiler for our kernels.

        Blocks until all ranks do the same. Raises RankLostError.
        """
        if device.type == "cpu":
            try:
                return SharedMemoryCollectives(self.shape, rank, self.region, load_native_library())
            except NativeUnavailableError:
                pass  # the same on all ranks: they are on one host
        # The groups may use the file as long as they live, so this descriptor stays open until the process ends.
        store = FileStore(f"/proc/self/fd/{os.dup(self.store_fd)}", self.shape.num_ranks)
        return ProcessGroupCollectives.connect(self.shape, rank, store, device, _HOST)


def engine_config(model: Path, section: EngineSection, rank: int = 0) -> EngineConfig:
    """Of one rank of an instance. Raises ConfigError."""
    device, num_ranks = section.device, section.shape.num_ranks
    if num_ranks > 1 and choose_device(device).type == "cuda":
        device = f"cuda:{rank}"
    return EngineConfig(
        model_path=model,
        dtype=section.dtype,
        device=device,
        num_threads=section.threads if num_ranks == 1 else max(1, choose_threads(section.threads) // num_ranks),
        kv_memory_bytes=section.kv_memory,
        block_size=section.block_size,
        max_model_len=section.max_model_len,
        ops=section.ops,
    )

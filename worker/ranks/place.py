"""Where a rank of an instance computes, and how it meets the other ranks."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._C._distributed_c10d import FileStore

from tandem.core.instance_section import EngineSection
from tandem.core.parallel import ParallelShape, RankHosts
from tandem.engine.collectives.across_hosts import AcrossHostsCollectives
from tandem.engine.collectives.interface import Collectives
from tandem.engine.collectives.process_groups import ProcessGroupCollectives
from tandem.engine.collectives.shared_memory import SharedMemoryCollectives, SharedRegion
from tandem.engine.config import EngineConfig
from tandem.engine.device import choose_device, choose_threads
from tandem.engine.ops.native_library import NativeUnavailableError, load_native_library
from tandem.worker.ranks.store import RankStore

_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class MeetingPlace:
    """Connects the ranks of an instance on one host. They share `region`, and the file `store_fd` through which process
    groups connect; the file is the caller's. Like the region it has no name, and vanishes with the last process that
    has it, however that process ends."""

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
        if (shared := _shared_memory(self.shape, rank, self.region, device)) is not None:
            return shared
        # The groups may use the file as long as they live, so this descriptor stays open until the process ends.
        store = FileStore(f"/proc/self/fd/{os.dup(self.store_fd)}", self.shape.num_ranks)
        return ProcessGroupCollectives.connect(self.shape, rank, store, device, _HOST)


@dataclass(frozen=True, slots=True)
class HostsMeetingPlace:
    """Connects a rank of an instance on several hosts with the other ranks: by `region`, which it shares with the ranks
    of its host, and by `store`. gloo listens on `address`, where the other hosts reach this one."""

    hosts: RankHosts
    region: SharedRegion
    store: RankStore
    address: str

    def collectives(self, rank: int, device: torch.device) -> Collectives:
        """gloo or NCCL, and shared memory between CPUs of one host. Blocks until all ranks do the same. Raises
        RankLostError."""
        shape = self.hosts.shape
        between = ProcessGroupCollectives.connect(shape, rank, self.store, device, self.address)
        within = _shared_memory(shape, rank, self.region, device)
        return between if within is None else AcrossHostsCollectives(self.hosts, rank, within, between)


def engine_config(model: Path, section: EngineSection, rank: int = 0, hosts: RankHosts | None = None) -> EngineConfig:
    """The configuration of one rank; `hosts` None: all ranks are on this host. Raises ConfigError."""
    device, num_ranks = section.device, section.shape.num_ranks
    of_host = range(num_ranks) if hosts is None else hosts.ranks_of(hosts.host_of(rank))
    if num_ranks > 1 and choose_device(device).type == "cuda":
        device = f"cuda:{rank - of_host.start}"
    # As a setting, threads are those of the whole instance; else they are the cores of this host.
    sharing = num_ranks if section.threads else len(of_host)
    return EngineConfig(
        model_path=model,
        dtype=section.dtype,
        device=device,
        num_threads=section.threads if num_ranks == 1 else max(1, choose_threads(section.threads) // sharing),
        kv_memory_bytes=section.kv_memory,
        block_size=section.block_size,
        max_model_len=section.max_model_len,
        ops=section.ops,
    )


def _shared_memory(
    shape: ParallelShape, rank: int, region: SharedRegion, device: torch.device
) -> SharedMemoryCollectives | None:
    """None between GPUs and where there is no compiler for our kernels: the same on all ranks of a host."""
    if device.type != "cpu":
        return None
    try:
        return SharedMemoryCollectives(shape, rank, region, load_native_library())
    except NativeUnavailableError:
        return None

"""Computes the processes of a cluster from a serve configuration and a machine. Starts nothing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from tandem.core.config import RouterConfig, ServeConfig, WorkerConfig
from tandem.core.errors import ConfigError
from tandem.core.instance_section import EngineSection


class ProcessRole(Enum):
    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


# Application classes; they implement `HostedApp` of deploy/hosted_process.py.
_ROUTER_ENTRY = "tandem.router.app:RouterApp"
_WORKER_ENTRY = "tandem.worker.app:Worker"
RANKS_ENTRY = "tandem.worker.ranks.host:RankHost"  # of an instance, on another host than rank 0's


@dataclass(frozen=True, slots=True)
class Machine:
    """The resources to divide. `cores` and `memory_bytes` are what this process may use of them; None: unknown.
    `nodes` is 0 for this machine; for a Ray cluster of so many, all nodes that are there now count together.
    `multiplies_bf16`: the CPU is known to have instructions for it, so that the engine computes in bf16 there."""

    cores: int
    gpus: int = 0
    nodes: int = 0
    memory_bytes: int | None = None
    multiplies_bf16: bool = False


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process: its application, configuration and resources. An instance of several ranks is one process here: it
    starts the other ranks of its host itself, and a launcher those of other hosts. `threads` and `gpus` are for all
    ranks; `gpus` below 1 is a share of one device. `shares_cores`: its threads are its share of the cores, not a
    setting.
    """

    role: ProcessRole
    index: int
    entry: str
    config: WorkerConfig | RouterConfig
    threads: int
    gpus: float = 0.0
    shares_cores: bool = False

    @property
    def name(self) -> str:
        return f"{self.role.value}-{self.index}"

    def under_name(self, name: str) -> "ProcessSpec":
        """The same instance as the process `name`, which was started in another role."""
        role, _, index = name.rpartition("-")
        config = self.config.model_copy(update={"name": name})
        return replace(self, role=ProcessRole(role), index=int(index), config=config)

    def can_become(self, other: "ProcessSpec") -> bool:
        """Whether a process of this kind can go on as one of the other kind. Role, bounds of steps, and routers are
        told to an instance while it runs; shares of cores and devices stay as they are until it is started again."""
        return self._lasting() == other._lasting()

    def _lasting(self) -> "ProcessSpec":
        """Without what does not need another process."""
        config = self.config
        if isinstance(config, WorkerConfig):
            engine = config.instance.engine
            if self.shares_cores:
                engine = engine.model_copy(update={"threads": 0})
            bounds = {"max_batch": 1, "max_batch_tokens": None, "max_prefill_tokens": None}
            instance = config.instance.model_copy(update={"engine": engine, **bounds})
            config = config.model_copy(update={"instance": instance, "role": "colocated", "routers": ()})
        return replace(self, config=config, threads=0 if self.shares_cores else self.threads, gpus=0.0)


def plan_processes(config: ServeConfig, machine: Machine) -> tuple[ProcessSpec, ...]:
    """The router first, if there is one, then prefill, decode and colocated instances. `config.cluster_token` must be
    set.

    Instances whose `threads` is 0 share the cores that other instances leave; each rank gets at least one. The router
    gets no core of its own: it works while instances wait for it, and a reserved core would be idle most of the time.

    Raises ConfigError for an instance of several ranks that do not get a GPU each.
    """
    assert config.cluster_token, "processes of one cluster share a token"
    instances = [(role, section) for role, section in config.kinds for _ in range(section.instances)]
    threads = share_threads(machine.cores, [section.engine.threads for _, section in instances])
    on_gpu = sum(section.engine.shape.num_ranks for _, section in instances if uses_gpu(section.engine, machine))
    specs = [_router_of(config)] if config.start_router else []
    numbers: Counter[str] = Counter()
    for (role, section), share in zip(instances, threads, strict=True):
        gpus = _gpus_of(section.engine, machine, on_gpu)
        shares_cores = section.engine.threads == 0
        share = max(share, section.engine.shape.num_ranks)
        engine = section.engine.model_copy(update={"threads": share})
        worker = WorkerConfig(
            model=config.model,
            model_name=config.model_name,
            role=role,
            model_hash=config.model_hash,
            name=f"{role}-{numbers[role]}",  # as `tandem serve` calls the process
            routers=(config.router.control,) if config.start_router else (),
            cluster_token=config.cluster_token,
            cluster_tls=config.cluster_tls,
            log_format=config.log_format,
            instance=section.model_copy(update={"instances": 1, "engine": engine}),
        )
        specs.append(ProcessSpec(ProcessRole(role), numbers[role], _WORKER_ENTRY, worker, share, gpus, shares_cores))
        numbers[role] += 1
    return tuple(specs)


def _router_of(config: ServeConfig) -> ProcessSpec:
    router = RouterConfig(
        model=config.model,
        model_name=config.model_name,
        router=config.router,
        cluster_token=config.cluster_token,
        cluster_tls=config.cluster_tls,
        log_format=config.log_format,
    )
    return ProcessSpec(ProcessRole.ROUTER, 0, _ROUTER_ENTRY, router, threads=1)


def share_threads(cores: int, fixed: Sequence[int]) -> list[int]:
    """Threads of each instance; `fixed` has 0 for instances that share the rest. The first ones get the remainder."""
    sharing = [index for index, threads in enumerate(fixed) if threads == 0]
    left = max(cores - sum(fixed), len(sharing))
    shares = list(fixed)
    for position, index in enumerate(sharing):
        shares[index] = left // len(sharing) + (position < left % len(sharing))
    return shares


def uses_gpu(engine: EngineSection, machine: Machine) -> bool:
    """Whether an instance with these settings computes on a GPU there."""
    return engine.device.startswith("cuda") or (engine.device == "auto" and machine.gpus > 0)


def _gpus_of(engine: EngineSection, machine: Machine, ranks: int) -> float:
    """One device for each of all `ranks` if there are enough, else equal shares, rounded down so that all fit. On a Ray
    cluster always one: an instance waits for a node that has it.

    Raises ConfigError for an instance of several ranks, which do not share a device.
    """
    if not uses_gpu(engine, machine):
        return 0.0
    if machine.nodes or machine.gpus >= ranks:
        return float(engine.shape.num_ranks)
    if engine.shape.num_ranks > 1:
        raise ConfigError(
            f"the instances have {ranks} ranks on GPUs, and this machine has {machine.gpus}; ranks of one instance do "
            "not share a GPU: reduce instances, tp or pp"
        )
    per_device = -(-ranks // max(machine.gpus, 1))
    return int(100 / per_device) / 100

"""A serve file and a machine -> the processes to run. Pure arithmetic; nothing is started here."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from tandem.core.config import EngineSection, RouterConfig, ServeConfig, WorkerConfig


class ProcessRole(Enum):
    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"


# Where each role's application class lives: `HostedApp` of deploy/process_host.py.
ENTRIES = {
    ProcessRole.ROUTER: "tandem.router.app:RouterApp",
    ProcessRole.PREFILL: "tandem.prefill_worker.app:PrefillWorker",
    ProcessRole.DECODE: "tandem.decode_worker.app:DecodeWorker",
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What may be shared out. `cores` are those this process may run on."""

    cores: int
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process: what it runs and what it may use. `gpus` below 1 is a share of one device."""

    role: ProcessRole
    index: int
    entry: str
    config: WorkerConfig | RouterConfig
    threads: int
    gpus: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.role.value}-{self.index}"


def plan_processes(config: ServeConfig, machine: Machine) -> tuple[ProcessSpec, ...]:
    """The router first, then prefill, then decode instances. `config.cluster_token` must be set.

    Instances whose `threads` is 0 share the cores that the others leave, one at least for each. The router gets none
    of its own: it works while the workers wait for it, and a core kept for it would be a core not computing.
    """
    assert config.cluster_token, "processes of one cluster share a token"
    sections: list[tuple[ProcessRole, int, EngineSection]] = []
    sections += [(ProcessRole.PREFILL, i, config.prefill.engine) for i in range(config.prefill.instances)]
    sections += [(ProcessRole.DECODE, i, config.decode.engine) for i in range(config.decode.instances)]
    threads = share_threads(machine.cores, [engine.threads for _, _, engine in sections])
    on_gpu = sum(_wants_gpu(engine, machine) for _, _, engine in sections)
    specs = [_router_spec(config)]
    for (role, index, engine), share in zip(sections, threads, strict=True):
        gpus = _gpu_share(machine.gpus, on_gpu) if _wants_gpu(engine, machine) else 0.0
        worker = _worker_config(config, share)
        specs.append(ProcessSpec(role, index, ENTRIES[role], worker, share, gpus))
    return tuple(specs)


def share_threads(cores: int, fixed: Sequence[int]) -> list[int]:
    """Threads of each instance; `fixed` has 0 for those that share. What does not divide goes to the first ones."""
    sharing = [index for index, threads in enumerate(fixed) if threads == 0]
    left = max(cores - sum(fixed), len(sharing))
    shares = list(fixed)
    for place, index in enumerate(sharing):
        shares[index] = left // len(sharing) + (place < left % len(sharing))
    return shares


def _wants_gpu(engine: EngineSection, machine: Machine) -> bool:
    return engine.device.startswith("cuda") or (engine.device == "auto" and machine.gpus > 0)


def _gpu_share(gpus: int, instances: int) -> float:
    """A whole device each where there are enough, else equal shares, rounded down so that all of them fit."""
    if gpus >= instances:
        return 1.0
    per_device = -(-instances // max(gpus, 1))
    return int(100 / per_device) / 100


def _router_spec(config: ServeConfig) -> ProcessSpec:
    router = RouterConfig(
        model=config.model,
        model_name=config.model_name,
        router=config.router,
        cluster_token=config.cluster_token,
    )
    return ProcessSpec(ProcessRole.ROUTER, 0, ENTRIES[ProcessRole.ROUTER], router, threads=1)


def _worker_config(config: ServeConfig, threads: int) -> WorkerConfig:
    engine = {"threads": threads}
    prefill = config.prefill.model_copy(update={"engine": config.prefill.engine.model_copy(update=engine)})
    decode = config.decode.model_copy(update={"engine": config.decode.engine.model_copy(update=engine)})
    return WorkerConfig(
        model=config.model,
        model_name=config.model_name,
        routers=(config.router.control,),
        cluster_token=config.cluster_token,
        prefill=prefill,
        decode=decode,
    )

"""The state of the processes that a controller keeps running."""

from dataclasses import dataclass
from enum import Enum


class ProcessState(Enum):
    """WAITING: the process has failed, and is started again after a pause. DRAINED: an operator has taken it out of
    service."""

    LOADING = "loading"
    UP = "up"
    WAITING = "waiting"
    STOPPING = "stopping"
    DRAINED = "drained"


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """`role` is `router` or the instance's role. `pid` is 0, and `address` and `instance_id` are empty, while the
    process is not UP. `failures` counts failures in a row, and `note` is the reason of the last one."""

    name: str
    role: str
    state: ProcessState
    pid: int = 0
    address: str = ""
    instance_id: str = ""
    failures: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """`routers` are the control addresses that instances report to."""

    model: str
    processes: tuple[ProcessStatus, ...]
    routers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClusterChange:
    """Names of the processes that were started, stopped, and replaced by others with other settings."""

    started: tuple[str, ...] = ()
    stopped: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()

"""A process of the cluster, as those who start it hand it to those who supervise it."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from tandem.deploy.topology import ProcessRole, ProcessSpec


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """A running process. Workers' `address` is their gRPC address, the router's is its HTTP address."""

    name: str
    role: ProcessRole
    pid: int
    address: str
    instance_id: str
    log_path: str


@dataclass(frozen=True, slots=True)
class ProcessEnd:
    """`was_asked`: somebody told the process to end, and it did so. That is no failure."""

    reason: str
    was_asked: bool = False


class RunningProcess(Protocol):
    info: ProcessInfo

    @property
    def is_draining(self) -> bool:
        """Whether it finishes its requests and is about to end, whoever told it to."""
        ...

    async def wait_closed(self) -> ProcessEnd:
        """Wait until the process has ended."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Let the process finish its requests for up to `grace_s`, then end it."""
        ...

    async def kill(self) -> None:
        """End the process now and free its resources, also where it is stopped. No effect if it has ended."""
        ...


Watch = Callable[[ProcessSpec, RunningProcess], Coroutine[Any, Any, str]]
"""Returns, in words, why the running process has to be replaced: it makes no progress. Runs until then."""


class Launcher(Protocol):
    async def launch(self, spec: ProcessSpec) -> RunningProcess:
        """Returns when the process is ready. Raises a TandemError. After an error or a cancellation no process is
        left."""
        ...

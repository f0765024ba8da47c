"""Runs the planner's simulations on a Ray cluster: a `placement.search.mapper.Mapper` of Ray tasks.

The cluster's machines need the same version of this package: Ray sends functions by name and arguments by value.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

from tandem.core.errors import UnavailableError
from tandem.core.owned_folder import OwnedFolder
from tandem.deploy.machine import usable_cores
from tandem.deploy.ray_cluster import LocalRay, import_ray, join_ray

LOCAL = "local"
_CHUNKS_PER_WORKER = 4  # balances the load, at a small cost per task

T = TypeVar("T")
R = TypeVar("R")


class RayMapper:
    """Ray tasks of one core each; a task has several items if there are many. A single item runs in this process."""

    def __init__(self, ray: ModuleType, workers: int) -> None:
        """`ray` has been started or joined."""
        self.workers = workers
        self._ray = ray
        self._task: Any = ray.remote(num_cpus=1)(_apply)

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Raises what the function raises, and UnavailableError when Ray has lost a task."""
        if len(items) < 2:
            return [function(item) for item in items]
        ray = self._ray
        shared = ray.put(function)  # with its bound arguments, which may be large: sent once for all tasks
        size = -(-len(items) // (_CHUNKS_PER_WORKER * self.workers))
        tasks = [self._task.remote(shared, items[begin : begin + size]) for begin in range(0, len(items), size)]
        return [result for chunk in self._results(tasks) for result in chunk]

    def _results(self, tasks: list[Any]) -> list[Any]:
        """After a failure other tasks may continue; they end with the connection. (Cancelling one that is about to end
        makes Ray 2.60 end this process: "Tried to complete task that was not pending".)"""
        ray = self._ray
        try:
            results: list[Any] = ray.get(tasks)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ImportError):
                raise UnavailableError(f"the cluster's machines lack this version of tandem ({error.cause})") from error
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise UnavailableError(f"Ray lost a part of the work ({type(error).__name__})") from error
        return results


@contextmanager
def ray_mapper(address: str) -> Iterator[RayMapper]:
    """`address`: `local` for a private Ray on this machine, stopped at the end; `auto` for the cluster of this machine;
    host:port of a cluster's head; ray://host:port for a client outside the cluster.

    Raises UnavailableError if there is no cluster, ConfigError for an invalid address.
    """
    if address == LOCAL:
        folder = OwnedFolder.make("ray")
        local_ray = LocalRay(folder.path / "p")
        cores = usable_cores()
        try:
            local_ray.start(processes=cores, gpus=0)
            yield RayMapper(import_ray(), cores)
        finally:
            local_ray.stop()
            folder.remove()
        return
    ray = join_ray(address, "plan without --ray")
    try:
        yield RayMapper(ray, max(1, int(ray.cluster_resources().get("CPU", 1))))
    finally:
        ray.shutdown()


def _apply(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return [function(item) for item in items]

"""Starts processes on the nodes of a Ray cluster that others have started.

For each instance Ray holds a placement group of one bundle, so an instance is on one node; in the bundle is an actor,
the parent of the process (`deploy.process_host`). Ray supervises nothing: an actor that has ended is not started again,
and the controller replaces the instance as a whole, where there is room.

    launch: choose a node -> placement group there -> actor in it -> process ready
    the node dies, or does not answer for `UNREACHABLE_S` -> the process has ended

A node that is cut off goes on computing. When Ray sees it again, Ray ends its actors, which the controller has killed.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from tandem.core.clock import Clock
from tandem.core.config import WorkerConfig
from tandem.core.errors import NotFoundError, UnavailableError, error_from_code
from tandem.deploy.log_file import LogPart, follow_log
from tandem.deploy.model_folder import hash_of_model
from tandem.deploy.node_placement import Node, NodePlacement, bundle_of, no_room
from tandem.deploy.process_host import HostReport, HostSettings, ProcessHost, read_log_here
from tandem.deploy.running_process import ProcessEnd, ProcessInfo, RunningProcess
from tandem.deploy.topology import ProcessRole, ProcessSpec

log = logging.getLogger(__name__)

NAMESPACE = "tandem"
UNREACHABLE_S = 15.0  # Ray itself gives a node that was cut off up a minute later
_PLACEMENT_S = 30
_SIGN_PERIOD_S = 1.0
_CALL_S = 5.0
_MARGIN_S = 60.0  # beyond load_timeout_s: Ray starts the actor before it starts the process


def living_nodes(ray: ModuleType) -> list[Node]:
    nodes = (node for node in ray.nodes() if node["Alive"])
    return [Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"]) for node in nodes]


@dataclass(frozen=True, slots=True)
class _Held:
    """What Ray holds for a process. `group` is None for a router, which needs no resources."""

    host: Any
    group: Any


class RayNodeLauncher:
    """A `Launcher`. Routers are on the node of this process, where their addresses are. With `outlives`, processes
    outlive it: the next launcher of the same `cluster` takes them back."""

    def __init__(
        self,
        ray: ModuleType,
        cluster: str,
        placement: NodePlacement,
        settings: HostSettings,
        clock: Clock,
        *,
        outlives: bool = False,
    ) -> None:
        """`ray` has been joined."""
        self._ray = ray
        self._cluster = cluster
        self._placement = placement
        self._settings = settings
        self._clock = clock
        self._lifetime = "detached" if outlives else None
        self._own_node = ray.get_runtime_context().get_node_id()
        self._turn = asyncio.Lock()
        self._hashes: dict[Path, asyncio.Task[str | None]] = {}
        self._left: dict[str, tuple[ProcessSpec, HostReport, _Held]] = {}  # by the process's name
        self._ran_on: dict[str, str] = {}  # process -> node id, of its last start

    # --- take back ---------------------------------------------------------------------------------------------------

    async def find_left_running(self) -> list[ProcessSpec]:
        """What an earlier controller has left; `launch` takes each back instead of starting it. What was not ready yet
        is ended."""
        prefix = f"{self._cluster}/"
        for actor in self._ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] != NAMESPACE or not actor["name"].startswith(prefix):
                continue
            held = self._held_of(actor["name"])
            if held is None:
                continue
            spec, report = None, None
            with contextlib.suppress(self._ray.exceptions.RayError, TimeoutError):
                async with asyncio.timeout(_CALL_S):
                    spec, report = await held.host.describe.remote()
            if spec is None or report is None or spec.name in self._left:
                self._let_go(held)
                continue
            if spec.role is not ProcessRole.ROUTER:
                self._placement.put(spec, report.node_id)
            self._left[spec.name] = (spec, report, held)
            self._ran_on[spec.name] = report.node_id
        return [spec for spec, _, _ in self._left.values()]

    def _held_of(self, key: str) -> _Held | None:
        try:
            host = self._ray.get_actor(key, namespace=NAMESPACE)
        except ValueError:  # it has just ended
            return None
        group = None
        with contextlib.suppress(ValueError):  # a router has none
            group = self._ray.util.get_placement_group(key)
        return _Held(host, group)

    async def find_misplaced(self) -> tuple[str, ...]:
        """Processes that are not on the node of their plan, which could take them: it was away when they started."""
        return self._placement.misplaced(await asyncio.to_thread(living_nodes, self._ray))

    # --- launch ------------------------------------------------------------------------------------------------------

    async def launch(self, spec: ProcessSpec) -> RunningProcess:
        """Raises the application's error, or UnavailableError: no room, the node died, or the process was not ready
        within `load_timeout_s`."""
        if (left := self._left.pop(spec.name, None)) is not None:
            return self._running(*left)
        held = _Held(None, None)
        report: HostReport | None = None
        try:
            async with asyncio.timeout(self._settings.load_timeout_s + _MARGIN_S):
                key = f"{self._cluster}/{spec.name}/{secrets.token_hex(4)}"
                model_hash = await self._hash_for(spec)
                held = _Held(None, await self._reserve(key, spec))
                held = _Held(self._start_host(key, spec, held.group), held.group)
                report = await held.host.start.remote(spec, model_hash)
                self._ran_on[spec.name] = report.node_id
        except TimeoutError as error:
            raise UnavailableError(f"{spec.name} was not ready in time on the Ray cluster") from error
        except self._ray.exceptions.RayError as error:
            raise UnavailableError(f"{spec.name} could not be started by Ray ({_first_line(error)})") from error
        finally:
            if report is None or report.info is None:
                self._release(spec, held)
        if report.info is None:
            raise error_from_code(report.error_code, f"on {report.host}: {report.error_message}")
        if spec.role is not ProcessRole.ROUTER:
            self._placement.put(spec, report.node_id)
        return self._running(spec, report, held)

    async def _reserve(self, key: str, spec: ProcessSpec) -> Any:
        """A placement group for the instance, on the chosen node if Ray has room there; None for a router. Raises
        UnavailableError."""
        if spec.role is ProcessRole.ROUTER:
            return None
        async with self._turn:  # in the order of the processes, so that equal clusters are placed equally
            node = self._placement.choose(spec, await asyncio.to_thread(living_nodes, self._ray))
        group = self._ray.util.placement_group(
            [dict(bundle_of(spec))],
            strategy="STRICT_PACK",
            name=key,
            lifetime=self._lifetime,
            _soft_target_node_id=node.node_id,
        )
        is_placed = False
        try:
            is_placed = await asyncio.to_thread(group.wait, _PLACEMENT_S)
        finally:
            if not is_placed:
                self._ray.util.remove_placement_group(group)
        if not is_placed:
            raise no_room(spec)
        return group

    def _start_host(self, key: str, spec: ProcessSpec, group: Any) -> Any:
        strategies = self._ray.util.scheduling_strategies
        if group is None:
            strategy = strategies.NodeAffinitySchedulingStrategy(self._own_node, soft=False)
        else:
            strategy = strategies.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        actor = self._ray.remote(ProcessHost).options(
            name=key,
            namespace=NAMESPACE,
            lifetime=self._lifetime,
            num_cpus=0,
            num_gpus=spec.gpus,
            max_restarts=0,
            scheduling_strategy=strategy,
        )
        return actor.remote(self._settings)

    async def _hash_for(self, spec: ProcessSpec) -> str | None:
        """Of the model files on this node: those of all nodes must be equal. None for a router, and where this node has
        no weights to compare with."""
        if not isinstance(spec.config, WorkerConfig) or spec.config.model_hash is not None:
            return None
        model = spec.config.model
        if model not in self._hashes:
            self._hashes[model] = asyncio.create_task(self._hash_of(model))
        return await asyncio.shield(self._hashes[model])

    async def _hash_of(self, model: Path) -> str | None:
        """In a task of Ray: torch, which reads the files, is not in this process."""
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(self._own_node, soft=False)
        task = self._ray.remote(hash_of_model).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
        try:
            model_hash: str = await task.remote(model)
        except self._ray.exceptions.RayError as error:
            log.warning("the model files of the hosts are not compared (%s)", _first_line(error))
            return None
        return model_hash

    # --- logs --------------------------------------------------------------------------------------------------------

    async def read_log(self, process: str, num_past: int, follow: bool) -> AsyncIterator[tuple[str, ...]]:
        """From the node where the process runs, or has run last. Raises NotFoundError, UnavailableError."""

        async def read(position: int | None) -> LogPart:
            if (node := self._ran_on.get(process)) is None:
                raise NotFoundError(f"{process} has not run on any node yet")
            strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
            task = self._ray.remote(read_log_here).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
            try:
                part: LogPart = await task.remote(self._settings.run, process, num_past, position)
            except self._ray.exceptions.RayTaskError as error:
                raise NotFoundError(f"the log of {process} cannot be read ({_first_line(error)})") from error
            except self._ray.exceptions.RayError as error:
                raise UnavailableError(f"the node of {process} does not answer ({_first_line(error)})") from error
            return part

        async for lines in follow_log(read, follow=follow):
            yield lines

    # --- processes ---------------------------------------------------------------------------------------------------

    def _running(self, spec: ProcessSpec, report: HostReport, held: _Held) -> "RayProcess":
        assert report.info is not None, "it is ready"
        release = partial(self._release, spec, held)
        return RayProcess(report.info, report.host, held.host, self._ray, self._clock, release)

    def _release(self, spec: ProcessSpec, held: _Held) -> None:
        self._placement.release(spec.name)
        self._let_go(held)

    def _let_go(self, held: _Held) -> None:
        """The kernel ends the process with its parent, the actor."""
        if held.host is not None:
            self._ray.kill(held.host, no_restart=True)
        if held.group is not None:
            self._ray.util.remove_placement_group(held.group)


class RayProcess:
    """Implements `deploy.controller.RunningProcess`, by its parent on another node. `release` gives back what Ray holds
    for it."""

    def __init__(
        self, info: ProcessInfo, where: str, host: Any, ray: ModuleType, clock: Clock, release: Callable[[], None]
    ) -> None:
        self.info = info
        self.is_draining = False
        self._where = where
        self._host = host
        self._ray = ray
        self._clock = clock
        self._release = release

    async def wait_closed(self) -> ProcessEnd:
        ended, silent = asyncio.create_task(self._wait_ended()), asyncio.create_task(self._wait_silent())
        try:
            await asyncio.wait((ended, silent), return_when=asyncio.FIRST_COMPLETED)
            return ended.result() if ended.done() else ProcessEnd(silent.result())
        finally:
            ended.cancel()
            silent.cancel()
            await asyncio.gather(ended, silent, return_exceptions=True)

    async def stop(self, grace_s: float) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):  # it has ended meanwhile
            await self._host.stop.remote(grace_s)

    async def kill(self) -> None:
        """A node that does not answer is left alone: Ray ends what runs there."""
        with contextlib.suppress(self._ray.exceptions.RayError, TimeoutError):
            async with asyncio.timeout(_CALL_S):
                await self._host.kill.remote()
        self._release()

    async def _wait_ended(self) -> ProcessEnd:
        exceptions = self._ray.exceptions
        while True:
            try:
                end: ProcessEnd = await self._host.wait_ended.remote()
                return ProcessEnd(f"on {self._where}: {end.reason}", end.was_asked)
            except exceptions.ActorUnavailableError:  # perhaps for a moment
                await asyncio.sleep(_SIGN_PERIOD_S)
            except exceptions.RayError as error:
                return ProcessEnd(
                    f"its node {self._where} has died, or has left the Ray cluster ({_first_line(error)})"
                )

    async def _wait_silent(self) -> str:
        """Returns when the node has given no sign of life for `UNREACHABLE_S`, in which this process was not late."""
        answered_s = self._clock.now_s()
        while True:
            began_s = self._clock.now_s()
            with contextlib.suppress(self._ray.exceptions.RayError, TimeoutError):
                async with asyncio.timeout(_CALL_S):
                    self.is_draining = await self._host.is_draining.remote()
                answered_s = self._clock.now_s()
            now_s = self._clock.now_s()
            if now_s - began_s > _CALL_S + 1.0:
                answered_s = now_s
            if now_s - answered_s > UNREACHABLE_S:
                return f"its node {self._where} has not answered for {now_s - answered_s:.0f} s"
            await asyncio.sleep(_SIGN_PERIOD_S)


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"

"""Starts processes on the nodes of a Ray cluster that others have started.

For each instance Ray holds a placement group of one bundle, and in the bundle is an actor, the parent of the process
(`deploy.process_host`). An instance of several ranks that its plan has on several nodes, or that no node has room for,
has a bundle on each of them: rank 0's process is in the first one, the ranks of other nodes join it (`worker.ranks`).
Ray supervises nothing: an actor that has ended is not started again, and the controller replaces the instance as a
whole, where there is room.

    launch: choose nodes -> placement group there -> an actor in each bundle -> process ready
    the node dies, or does not answer for `UNREACHABLE_S` -> the process has ended

A node that is cut off goes on computing. When Ray sees it again, Ray ends its actors, which the controller has killed.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from tandem.core.clock import Clock
from tandem.core.config import RanksSection, WorkerConfig
from tandem.core.errors import NotFoundError, TandemError, UnavailableError, error_from_code
from tandem.deploy.log_file import LogPart, follow_log
from tandem.deploy.model_folder import hash_of_model
from tandem.deploy.node_placement import NodePlacement, RayNode, Seat, bundle_of, no_room, num_ranks_of
from tandem.deploy.process_host import HostReport, HostSettings, ProcessHost, read_log_here
from tandem.deploy.ray_node_process import RayProcess, first_line
from tandem.deploy.running_process import RunningProcess
from tandem.deploy.topology import RANKS_ENTRY, ProcessRole, ProcessSpec

log = logging.getLogger(__name__)

NAMESPACE = "tandem"
_PLACEMENT_S = 30
_CALL_S = 5.0
_NODE_ID = "ray.io/node-id"  # a label of each node
_RANKS = "/ranks-"  # in the name of an actor, after that of rank 0's: it is the parent of ranks on another node
_MARGIN_S = 60.0  # beyond load_timeout_s: Ray starts the actor before it starts the process


def living_nodes(ray: ModuleType) -> list[RayNode]:
    nodes = (node for node in ray.nodes() if node["Alive"])
    return [RayNode(node["NodeID"], node["NodeManagerAddress"], node["Resources"]) for node in nodes]


@dataclass(frozen=True, slots=True)
class _Held:
    """What Ray holds for a process. `hosts` are its parent and those of its ranks on other nodes. `group` is None for a
    router, which needs no resources."""

    hosts: tuple[Any, ...] = ()
    group: Any = None


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
        actors = self._ray.util.list_named_actors(all_namespaces=True)
        names = sorted(actor["name"] for actor in actors if actor["namespace"] == NAMESPACE)
        for key in dict.fromkeys(name.partition(_RANKS)[0] for name in names if name.startswith(prefix)):
            hosts = [self._actor(name) for name in names if name == key or name.startswith(key + _RANKS)]
            held = _Held(tuple(host for host in hosts if host is not None), self._group(key))
            described = await self._describe(held)
            if described is None or described[0].name in self._left:
                self._let_go(held)
                continue
            spec, reports = described
            self._is_on(spec, reports)
            self._left[spec.name] = (_as_asked(spec), reports[0], held)
        return [spec for spec, _, _ in self._left.values()]

    def _actor(self, name: str) -> Any:
        """None if it has just ended."""
        try:
            return self._ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return None

    def _group(self, key: str) -> Any:
        """None for a router."""
        try:
            return self._ray.util.get_placement_group(key)
        except ValueError:
            return None

    async def _describe(self, held: _Held) -> tuple[ProcessSpec, list[HostReport]] | None:
        """What runs there, and the reports of its nodes; None unless all of it runs."""
        reports, leading = [], None
        with contextlib.suppress(self._ray.exceptions.RayError, TimeoutError):
            async with asyncio.timeout(_CALL_S):
                for host in held.hosts:
                    spec, report = await host.describe.remote()
                    reports.append(report)
                    leading = leading or spec
        if leading is None or leading.entry == RANKS_ENTRY or len(reports) != len(_per_node(leading) or (1,)):
            return None
        return leading, reports

    async def find_misplaced(self) -> tuple[str, ...]:
        """Processes that are not on the node of their plan, which could take them: it was away when they started."""
        return self._placement.misplaced(await asyncio.to_thread(living_nodes, self._ray))

    # --- launch ------------------------------------------------------------------------------------------------------

    async def launch(self, spec: ProcessSpec) -> RunningProcess:
        """Raises the application's error, or UnavailableError: no room, the node died, or the process was not ready
        within `load_timeout_s`."""
        if (left := self._left.pop(spec.name, None)) is not None:
            return self._running(*left)
        held = _Held()
        report: HostReport | None = None
        try:
            async with asyncio.timeout(self._settings.load_timeout_s + _MARGIN_S):
                key = f"{self._cluster}/{spec.name}/{secrets.token_hex(4)}"
                model_hash = await self._hash_for(spec)
                group, per_node = await self._reserve(key, spec)
                held = _Held((), group)
                held = _Held(self._start_hosts(key, spec, group, per_node), group)
                report = await self._start(spec, held, per_node, model_hash)
        except TimeoutError as error:
            raise UnavailableError(f"{spec.name} was not ready in time on the Ray cluster") from error
        except self._ray.exceptions.RayError as error:
            raise UnavailableError(f"{spec.name} could not be started by Ray ({first_line(error)})") from error
        finally:
            if report is None or report.info is None:
                self._release(spec, held)
        if report.info is None:
            raise _error_of(report)
        return self._running(spec, report, held)

    async def _start(
        self, spec: ProcessSpec, held: _Held, per_node: tuple[int, ...], model_hash: str | None
    ) -> HostReport:
        """The report of rank 0's host. Raises the error of another one."""
        if held.group is not None:
            assert isinstance(spec.config, WorkerConfig), "a router has no group"
            where = await asyncio.to_thread(self._ray.util.placement_group_table, held.group)
            epoch = self._placement.plan_epoch_on(where["bundles_to_node_id"][0])
            spec = replace(spec, config=spec.config.model_copy(update={"plan_epoch": epoch}))
        if not per_node:
            report: HostReport = await held.hosts[0].start.remote(spec, model_hash)
            self._is_on(spec, [report])
            return report
        assert isinstance(spec.config, WorkerConfig), "a router has no ranks"
        section = RanksSection(listen=await held.hosts[0].find_address.remote(), per_host=per_node)
        spec = replace(spec, config=spec.config.model_copy(update={"ranks": section}))
        leading = asyncio.ensure_future(_result(held.hosts[0].start.remote(spec, model_hash)))
        ranks = replace(spec, entry=RANKS_ENTRY)
        joining = asyncio.gather(*(_start_ranks(host, ranks) for host in held.hosts[1:]))
        try:
            await asyncio.wait((leading, joining), return_when=asyncio.FIRST_COMPLETED)
            if leading.done() and leading.result().info is None:  # then nobody can join it
                return leading.result()
            others = await joining
            report = await leading
        finally:
            for task in (leading, joining):
                task.cancel()
            await asyncio.gather(leading, joining, return_exceptions=True)
        self._is_on(spec, [report, *others])
        return report

    def _is_on(self, spec: ProcessSpec, reports: Sequence[HostReport]) -> None:
        self._ran_on[spec.name] = reports[0].node_id
        if spec.role is not ProcessRole.ROUTER:
            numbers = _per_node(spec) or (num_ranks_of(spec),)
            placed = zip(reports, numbers, strict=True)
            self._placement.put(spec, [Seat(report.node_id, number) for report, number in placed])

    async def _reserve(self, key: str, spec: ProcessSpec) -> tuple[Any, tuple[int, ...]]:
        """A placement group for the instance, on the chosen nodes if Ray has room there, else on others, and the
        numbers of its ranks on each of several nodes; None for a router. Raises UnavailableError."""
        if spec.role is ProcessRole.ROUTER:
            return None, ()
        async with self._turn:  # in the order of the processes, so that equal clusters are placed equally
            seats = self._placement.choose(spec, await asyncio.to_thread(living_nodes, self._ray))
        bundles = [dict(bundle_of(spec, seat.num_ranks)) for seat in seats]
        if len(seats) == 1:
            tries: list[dict[str, Any]] = [{"strategy": "STRICT_PACK", "_soft_target_node_id": seats[0].node_id}]
        else:  # Ray knows a soft target for one node only
            there = {"bundle_label_selector": [{_NODE_ID: seat.node_id} for seat in seats]}
            tries = [{"strategy": "STRICT_SPREAD", **there}, {"strategy": "STRICT_SPREAD"}]
        for where in tries:
            group = self._ray.util.placement_group(bundles, name=key, lifetime=self._lifetime, **where)
            is_placed = False
            try:
                is_placed = await asyncio.to_thread(group.wait, _PLACEMENT_S)
            finally:
                if not is_placed:
                    self._ray.util.remove_placement_group(group)
            if is_placed:
                return group, tuple(seat.num_ranks for seat in seats) if len(seats) > 1 else ()
        raise no_room(spec)

    def _start_hosts(self, key: str, spec: ProcessSpec, group: Any, per_node: tuple[int, ...]) -> tuple[Any, ...]:
        """A parent in each bundle, rank 0's first."""
        if not per_node:
            return (self._start_host(key, group, 0, spec.gpus),)
        gpus = [bundle_of(spec, number).get("GPU", 0.0) for number in per_node]
        names = [key, *(f"{key}{_RANKS}{index:03}" for index in range(1, len(per_node)))]
        return tuple(self._start_host(name, group, index, gpus[index]) for index, name in enumerate(names))

    def _start_host(self, name: str, group: Any, bundle: int, gpus: float) -> Any:
        strategies = self._ray.util.scheduling_strategies
        if group is None:
            strategy = strategies.NodeAffinitySchedulingStrategy(self._own_node, soft=False)
        else:
            strategy = strategies.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        actor = self._ray.remote(ProcessHost).options(
            name=name,
            namespace=NAMESPACE,
            lifetime=self._lifetime,
            num_cpus=0,
            num_gpus=gpus,
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
            log.warning("the model files of the hosts are not compared (%s)", first_line(error))
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
                raise NotFoundError(f"the log of {process} cannot be read ({first_line(error)})") from error
            except self._ray.exceptions.RayError as error:
                raise UnavailableError(f"the node of {process} does not answer ({first_line(error)})") from error
            return part

        async for lines in follow_log(read, follow=follow):
            yield lines

    # --- processes ---------------------------------------------------------------------------------------------------

    def _running(self, spec: ProcessSpec, report: HostReport, held: _Held) -> "RayProcess":
        assert report.info is not None, "it is ready"
        release = partial(self._release, spec, held)
        return RayProcess(report.info, report.host, held.hosts[0], self._ray, self._clock, release)

    def _release(self, spec: ProcessSpec, held: _Held) -> None:
        self._placement.release(spec.name)
        self._let_go(held)

    def _let_go(self, held: _Held) -> None:
        """The kernel ends the process with its parent, the actor."""
        for host in held.hosts:
            self._ray.kill(host, no_restart=True)
        if held.group is not None:
            self._ray.util.remove_placement_group(held.group)


def _per_node(spec: ProcessSpec) -> tuple[int, ...]:
    """Numbers of ranks, of an instance on several nodes; else none."""
    ranks = spec.config.ranks if isinstance(spec.config, WorkerConfig) else None
    return () if ranks is None else ranks.per_host


def _as_asked(spec: ProcessSpec) -> ProcessSpec:
    """By the controller: which nodes it got is not its concern."""
    if isinstance(spec.config, WorkerConfig):
        return replace(spec, config=spec.config.model_copy(update={"ranks": None, "plan_epoch": None}))
    return spec


async def _start_ranks(host: Any, ranks: ProcessSpec) -> HostReport:
    """Raises the error of a host whose ranks could not join."""
    report: HostReport = await host.start.remote(ranks, None)
    if report.info is None:
        raise _error_of(report)
    return report


async def _result(reference: Any) -> HostReport:
    report: HostReport = await reference
    return report


def _error_of(report: HostReport) -> TandemError:
    return error_from_code(report.error_code, f"on {report.host}: {report.error_message}")

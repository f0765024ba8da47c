"""The controller of a cluster on the nodes of a Ray cluster, as a Ray actor.

    tandem serve --ray   the actor and all its processes end with the command
    tandem up --ray      the actor is detached: it outlives the command, and Ray starts it again, on another node if its
                         own is gone; then it takes back the processes that still run (decision 0022)

What should run is kept by Ray's head, written before anything is done. Commands and routers call the actor's gRPC port,
never the actor: Ray is asked only where the controller is.
"""

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from tandem.core.address import advertised, is_loopback, split_address
from tandem.core.clock import SystemClock
from tandem.core.errors import ConfigError, InternalError, TandemError, UnavailableError, error_from_code
from tandem.core.log_lines import configure_logging
from tandem.deploy.controller_server import serve_controller
from tandem.deploy.desired import Desired
from tandem.deploy.kept_task import cancel, keep
from tandem.deploy.machine import check_address, resolve_addresses
from tandem.deploy.node_placement import NodePlacement, PlannedNodes, machine_of
from tandem.deploy.plan_comparison import compare_with_plan
from tandem.deploy.plan_serving import planned_nodes
from tandem.deploy.private_file import make_private_folder
from tandem.deploy.process_host import HostSettings
from tandem.deploy.ray_cluster import import_ray
from tandem.deploy.ray_node_launcher import NAMESPACE, RayNodeLauncher, living_nodes
from tandem.deploy.run_state import StateFolders
from tandem.deploy.serving import Serving

log = logging.getLogger(__name__)

_STORE = b"tandem"


class RayController:
    """`cluster` is its name, for which there is one controller. `run` names the folder of logs on each host. `desired`,
    as JSON values, is what a new cluster should run."""

    def __init__(self, cluster: str, run: str, desired: Mapping[str, Any], outlives: bool) -> None:
        self._cluster, self._run_name, self._first, self._outlives = cluster, run, desired, outlives
        self._ray = import_ray()
        self._serves: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._life = asyncio.create_task(self._run(), name="controller")

    async def describe(self) -> dict[str, Any]:
        """Once the controller serves: its `address` and `desired`, what should run. Else `error_code` and
        `error_message`."""
        await asyncio.wait((self._life, self._serves), return_when=asyncio.FIRST_COMPLETED)
        if self._serves.done():
            return self._serves.result()
        error = self._life.exception()
        if not isinstance(error, TandemError):
            error = InternalError(f"the controller could not start ({type(error).__name__}: {error})")
        return {"error_code": error.code, "error_message": error.message}

    async def _run(self) -> None:
        ray, clock = self._ray, SystemClock()
        host: str = ray.util.get_node_ip_address()
        desired = self._load(host)
        configure_logging(desired.config.log_format, "controller")
        settings = HostSettings(self._run_name, desired.config.load_timeout_s, desired.grace_s)
        placement = NodePlacement(lambda: _planned(serving.desired))
        launcher = RayNodeLauncher(ray, self._cluster, placement, settings, clock, outlives=self._outlives)
        serving = Serving(
            desired,
            lambda: machine_of(living_nodes(ray)),
            launcher,
            clock,
            save=self._save,
            show=log.info,
            adapt=lambda changed: on_host(changed, host),
            read_log=launcher.read_log,
            find_misplaced=launcher.find_misplaced,
        )
        logs = StateFolders.of_environment(os.environ).logs / self._run_name
        make_private_folder(logs)
        async with serve_controller(serving, desired.config) as address:
            await self._save(desired)
            if self._outlives:
                serving.take_back(await launcher.find_left_running())
            helpers = [
                keep("the report of events", serving.say_events, log.info),
                keep("the news for processes", serving.tell_processes, log.info),
                keep("the start", lambda: _start(serving), log.info),
                keep("the comparison with the plan", lambda: compare_with_plan(serving, logs, log.info), log.info),
            ]
            self._serves.set_result({"address": address, "desired": desired.to_json()})
            await serving.has_stopped.wait()
            await cancel(helpers)
        if self._outlives:
            _kv()._internal_kv_del(self._key, namespace=_STORE)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    # --- what should run ---------------------------------------------------------------------------------------------

    @property
    def _key(self) -> bytes:
        return self._cluster.encode()

    def _load(self, host: str) -> Desired:
        """What this node is to run, with addresses of it. Raises ConfigError."""
        kept = _kv()._internal_kv_get(self._key, namespace=_STORE) if self._outlives else None
        desired = on_host(Desired.from_json(self._first if kept is None else json.loads(kept)), host)
        config = resolve_addresses(desired.config) if kept is None else desired.config
        try:
            controller = check_address("controller", config.controller)
        except ConfigError:
            if kept is None:
                raise
            controller = check_address("controller", advertised("any:0", host))
        return replace(desired, config=config.model_copy(update={"controller": controller}))

    async def _save(self, desired: Desired) -> None:
        if self._outlives:
            _kv()._internal_kv_put(self._key, json.dumps(desired.to_json()).encode(), True, namespace=_STORE)


def on_host(desired: Desired, host: str) -> Desired:
    """With the controller, and the router where others reach it, on `host`. The router's public ports stay as they are
    set, unless they were on the host of an earlier controller."""
    config = desired.config
    before = split_address(config.router.control)[0]
    moved = {"control": advertised(config.router.control, host)}
    for name in ("http", "grpc"):
        address = getattr(config.router, name)
        if not is_loopback(address) and split_address(address)[0] == before:
            moved[name] = advertised(address, host)
    router = config.router.model_copy(update=moved)
    controller = advertised(config.controller, host)
    return replace(desired, config=config.model_copy(update={"router": router, "controller": controller}))


def _planned(desired: Desired) -> PlannedNodes:
    return PlannedNodes() if desired.plan is None else planned_nodes(desired.plan)


async def _start(serving: Serving) -> None:
    try:
        await serving.start()
    except TandemError as error:  # whoever has asked for the start gets it too; what has failed is tried again
        log.warning("not all processes are up: %s", error.message)


def _kv() -> ModuleType:
    """The key-value store of Ray's head. Ray calls it internal; Ray Serve keeps its own state there."""
    from ray.experimental import internal_kv

    return internal_kv  # type: ignore[no-any-return]


# --- for commands ----------------------------------------------------------------------------------------------------


def find_controller(ray: ModuleType, cluster: str) -> Any | None:
    """The actor of that cluster, if it has one."""
    try:
        return ray.get_actor(_actor_name(cluster), namespace=NAMESPACE)
    except ValueError:
        return None


def start_controller(ray: ModuleType, cluster: str, run: str, desired: Desired, *, outlives: bool) -> Any:
    """A new actor on this node; see `RayController`. What an earlier cluster of that name should run is forgotten."""
    _kv()._internal_kv_del(cluster.encode(), namespace=_STORE)
    node = ray.get_runtime_context().get_node_id()
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=outlives)
    actor = ray.remote(RayController).options(
        name=_actor_name(cluster),
        namespace=NAMESPACE,
        lifetime="detached" if outlives else None,
        num_cpus=0,
        memory=1,  # Ray starts an actor that needs nothing on any node, whatever the strategy says
        max_restarts=-1 if outlives else 0,
        max_task_retries=-1 if outlives else 0,
        scheduling_strategy=strategy,
    )
    return actor.remote(cluster, run, desired.to_json(), outlives)


def ask_where(ray: ModuleType, controller: Any, timeout_s: float) -> tuple[str, Desired]:
    """The controller's address and what it is to run, once it serves. Raises its TandemError, or UnavailableError."""
    try:
        answer = ray.get(controller.describe.remote(), timeout=timeout_s)
    except ray.exceptions.RayError as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UnavailableError(
            f"the controller did not start on the Ray cluster ({type(error).__name__}: {first_line}); each of its "
            "hosts needs this version of tandem, in the Python that Ray runs with"
        ) from error
    if "error_code" in answer:
        raise error_from_code(answer["error_code"], answer["error_message"])
    return answer["address"], Desired.from_json(answer["desired"])


def _actor_name(cluster: str) -> str:
    return f"controller of {cluster}"

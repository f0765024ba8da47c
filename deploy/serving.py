"""A cluster from its start to its end, as `tandem serve` and `tandem up` run it."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence

from tandem.core.address import split_address
from tandem.core.clock import Clock
from tandem.core.cluster_status import ClusterChange, ClusterStatus, ProcessState, ProcessStatus
from tandem.core.config import ServeConfig, with_secrets
from tandem.core.errors import ConfigError, InvalidRequestError, NotFoundError, TandemError, UnavailableError
from tandem.core.instance_section import ROLES, RoleName
from tandem.core.plan import Plan
from tandem.core.session import Role
from tandem.deploy.change_queue import ChangeQueue
from tandem.deploy.controller import Controller
from tandem.deploy.desired import Desired
from tandem.deploy.finding import Grade
from tandem.deploy.fleet_query import wait_registered
from tandem.deploy.instance_settings import ROUTER_FORGOTTEN_S, InstanceSettings
from tandem.deploy.line_feed import LineFeed
from tandem.deploy.log_file import ReadLog
from tandem.deploy.plan_report import report_plans
from tandem.deploy.running_process import Launcher, Watch
from tandem.deploy.settings_checks import check_memory
from tandem.deploy.supervisor import Event, Failed, Loading, Stopped, Up
from tandem.deploy.topology import Machine, ProcessRole, ProcessSpec


def with_token(config: ServeConfig) -> ServeConfig:
    """The configuration with its cluster token, which is random if it has none. Raises ConfigError."""
    if config.cluster_token:
        return with_secrets(config)
    return config.model_copy(update={"cluster_token": secrets.token_urlsafe(32)})


async def _forget(desired: Desired) -> None:
    """For a cluster that ends with its controller."""


class Serving:
    """The running cluster. `desired` says what should run; each change of it is saved before anything is done, so that
    a controller that is started again does the same. Implements `wire.controller.ClusterHandler`.

    Changes are done one after the other. One goes on when its caller goes away; `stop` ends those in progress.
    """

    def __init__(
        self,
        desired: Desired,
        machine: Callable[[], Machine],
        launcher: Launcher,
        clock: Clock,
        watch: Watch | None = None,
        *,
        save: Callable[[Desired], Awaitable[None]] = _forget,
        show: Callable[[str], None] = lambda line: None,
        adapt: Callable[[Desired], Desired] = lambda desired: desired,
        tells_routers: bool = True,
        read_log: ReadLog | None = None,
        find_misplaced: Callable[[], Awaitable[Collection[str]]] | None = None,
        starts_first: Callable[[ProcessSpec], bool] = lambda spec: False,
        available_memory: Callable[[], int] | None = None,
    ) -> None:
        """`machine` tells what there is to divide. `watch`: as the controller's. `save` gets each new `desired`, `show`
        each line about what happens. `adapt` gives new settings the addresses of this host. Without `tells_routers`
        instances find the routers themselves. `read_log` is None where nobody asks for logs.
        `find_misplaced`: processes that new settings put back to where their plan has them. `starts_first`: as the
        controller's. `available_memory`: bytes that are free now, where all processes are on this machine."""
        self.desired = desired
        self.controller = Controller(launcher, clock, watch=watch, starts_first=starts_first)
        self.has_stopped = asyncio.Event()
        self._machine = machine
        self._adapt = adapt
        self._clock = clock
        self._read_log = read_log
        self._available_memory = available_memory
        self._find_misplaced = find_misplaced
        self._save = save
        self._lines = LineFeed(show)
        self._changes = ChangeQueue()
        self._settings = InstanceSettings(
            self.controller.running_instances,
            lambda: self.config,
            clock,
            tells_routers=tells_routers,
        )

    @property
    def config(self) -> ServeConfig:
        """With the cluster's addresses, its token and the number of its instances."""
        return self.desired.config

    # --- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> ClusterChange:
        """Start the configured processes; returns when the router can reach all instances.

        Raises the first TandemError of a process that cannot start.
        """
        return await self._changes.run(lambda: self._reconcile(self.desired.grace_s))

    def take_back(self, left_running: list[ProcessSpec]) -> None:
        """Supervise what an earlier controller has left; before `start`."""
        self.controller.take_back(left_running)

    async def stop(self, grace_s: float | None = None) -> None:
        """Stop all processes, whatever else is being done. `has_stopped` is set at the end."""
        await self._changes.close()
        await self.controller.stop(self.desired.grace_s if grace_s is None else grace_s)
        self.has_stopped.set()

    async def say_events(self) -> None:
        """Until cancelled: a line about each event of a process."""
        while True:
            self._lines.say(_line_of(await self.controller.events.get()))

    def say_last_events(self) -> None:
        while not self.controller.events.empty():
            self._lines.say(_line_of(self.controller.events.get_nowait()))

    async def tell_processes(self) -> None:
        """Until cancelled: tell instances their routers and roles, and routers the plan."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._settings.run(), name="settings of instances")
            report = report_plans(lambda: self.desired.plan, self._settings.routers, lambda: self.config)
            group.create_task(report, name="report of the plan")

    # --- changes -----------------------------------------------------------------------------------------------------

    async def apply(self, serve_file_json: str, grace_s: float | None = None, plan_json: str = "") -> ClusterChange:
        """Raises InvalidRequestError for what is no serve file or plan, ConfigError for settings that cannot work."""
        try:
            config = ServeConfig.model_validate(json.loads(serve_file_json))
            plan = Plan.model_validate(json.loads(plan_json)) if plan_json else None
        except ValueError as error:
            raise InvalidRequestError(f"these are not the settings of a serve file ({error})") from error
        words = "applying settings", "applied"
        return await self._changes.run(
            lambda: self._apply(
                lambda: self._adapt(self.desired.with_config(config, plan)), words, grace_s, places=True
            )
        )

    async def scale(self, instances: Mapping[str, int], grace_s: float | None = None) -> ClusterChange:
        """Change the number of instances. Removed instances finish their requests for up to `grace_s`."""
        numbers = " and ".join(f"{number} {role}" for role, number in instances.items())
        words = f"scaling to {numbers}", "scaled"
        return await self._changes.run(
            lambda: self._apply(lambda: self.desired.with_instances(instances), words, grace_s)
        )

    async def drain(self, process: str, grace_s: float | None = None, *, undo: bool = False) -> ClusterChange:
        """The process finishes its requests for up to `grace_s` and ends, and stays out of service until `undo`."""
        name = self._find(process).name
        words = (f"putting {name} back", f"{name} is back") if undo else (f"draining {name}", f"{name} is drained")
        return await self._changes.run(
            lambda: self._apply(lambda: self.desired.with_drained(name, undo=undo), words, grace_s)
        )

    async def set_role(self, process: str, role: str) -> None:
        """Raises NotFoundError, ConfigError, and what the instance answers."""
        await self._changes.run(lambda: self._set_role(self._find(process), role))

    # --- questions ---------------------------------------------------------------------------------------------------

    def status(self) -> ClusterStatus:
        drained = tuple(
            ProcessStatus(name, name.rpartition("-")[0], ProcessState.DRAINED)
            for name in sorted(self.desired.drained - {process.name for process in self.controller.status()})
        )
        return ClusterStatus(self.config.served_name, self.controller.status() + drained, self._settings.routers())

    def watch(self, num_past: int) -> AsyncIterator[str]:
        return self._lines.follow(num_past)

    async def logs(self, process: str, num_past: int, *, follow: bool) -> AsyncIterator[Sequence[str]]:
        """Raises NotFoundError. The cluster token is left out, whoever has written it."""
        name = self._find(process).name
        if self._read_log is None:
            raise NotFoundError(f"this controller does not know where the log of {name} is")
        token = self.config.cluster_token
        async for lines in self._read_log(name, num_past, follow):
            yield [line.replace(token, "...") if token else line for line in lines]

    def router_announced(self, control: str) -> float:
        """Raises ConfigError for what is not an address: no instance would take a list with it."""
        split_address(control)
        self._settings.router_announced(control)
        return ROUTER_FORGOTTEN_S

    # --- parts -------------------------------------------------------------------------------------------------------

    async def _apply(
        self, make: Callable[[], Desired], words: tuple[str, str], grace_s: float | None, *, places: bool = False
    ) -> ClusterChange:
        """`words`: what is said before and afterwards. With `places` processes go back to the nodes of their plan."""
        machine = self._machine()
        desired = make().reusing(self.desired, machine)  # raises for what cannot be
        self._lines.say(words[0])
        self._compare_memory(desired.config, machine)
        for name, process in desired.stands_in.items() - self.desired.stands_in.items():
            self._lines.say(f"  {process} goes on as {name}")
        await self._save(desired)
        self.desired = desired
        try:
            change = await self._reconcile(desired.grace_s if grace_s is None else grace_s, places=places)
        except TandemError as error:
            self._lines.say(f"not done: {error.message}")
            raise
        self._lines.say(words[1])
        return change

    def _compare_memory(self, config: ServeConfig, machine: Machine) -> None:
        """Warn, as the start of a cluster does: memory that is given is not always used."""
        if self._available_memory is not None:
            found = check_memory(config, machine, self._available_memory(), running=self.config)
            if found.grade is not Grade.OK:
                self._lines.say(f"  warning: {found.text}; {found.advice}")

    async def _reconcile(self, grace_s: float, *, places: bool = False) -> ClusterChange:
        find = self._say_misplaced if places else None
        change = await self.controller.reconcile(self.desired.processes(self._machine()), grace_s, find)
        await self._wait_registered()
        return change

    async def _say_misplaced(self) -> Collection[str]:
        misplaced = () if self._find_misplaced is None else await self._find_misplaced()
        for name in misplaced:
            self._lines.say(f"  {name} goes where the plan has it")
        return misplaced

    async def _set_role(self, process: ProcessStatus, role: str) -> None:
        if role not in ROLES:
            raise ConfigError(f"'{role}' is not a role; use one of {', '.join(ROLES)}")
        found = [(spec, info) for spec, info in self.controller.running_instances() if spec.name == process.name]
        if not found:
            raise UnavailableError(f"{process.name} is {process.state.value}; only a running instance has a role")
        ((_, info),) = found
        name: RoleName = next(known for known in ROLES if known == role)
        await self._settings.set_role(info, Role(role))
        self._lines.say(f"{process.name} has the role {role}")
        desired = self.desired.with_role(process.name, name)
        await self._save(desired)
        self.desired = desired
        await self.controller.reconcile(desired.processes(self._machine()), desired.grace_s)

    def _find(self, process: str) -> ProcessStatus:
        """By its name, or by the id of its instance. Raises NotFoundError."""
        known = self.status().processes
        for status in known:
            if process and process in (status.name, status.instance_id):
                return status
        names = ", ".join(status.name for status in known)
        raise NotFoundError(f"the cluster has no process '{process}'; it has {names}")

    async def _wait_registered(self) -> None:
        if not any(process.role is ProcessRole.ROUTER for process in self.controller.running()):
            return
        config = self.config
        await wait_registered(
            config.router.control, config.cluster_token, config.cluster_tls, self._instance_ids, self._clock
        )

    def _instance_ids(self) -> set[str]:
        return {info.instance_id for _, info in self.controller.running_instances()}


def _line_of(event: Event) -> str:
    match event:
        case Loading(name):
            return f"  {name} loading"
        case Up(info, load_s):
            return f"  {info.name} up in {load_s:.1f} s ({f'pid {info.pid}' if info.pid else info.address})"
        case Failed(name, reason, retry_s, failures):
            again = f" (failure {failures} in a row)" if failures > 1 else ""
            return f"  {name}: {reason}; starting it again in {retry_s:.1f} s{again}"
        case Stopped(name):
            return f"  {name} stopped"

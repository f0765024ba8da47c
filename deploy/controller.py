"""Keeps a set of processes running: starts them, notices when one has died or makes no progress, and starts it again.

    absent --start--> loading --up--> running --died, stalled, left--> waiting --delay--> loading
                        |  failed        |
                        +--> waiting     +--stop--> stopping --> absent

The delay doubles with every failure in a row up to a limit, and is reset once a process has run for a while. There is
no limit to the number of tries: an error from outside (a full disk, a model that is being replaced) can end at any
time, and each failure is reported with its number. An instance is always replaced as a whole: the new process has a new
instance id and cannot be mistaken for the old one.

The controller depends on the interfaces `Launcher` and `Watch` only, not on Ray.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from tandem.core.clock import Clock
from tandem.core.cluster_status import ClusterChange, ProcessState, ProcessStatus
from tandem.core.config import WorkerConfig
from tandem.core.errors import InternalError, TandemError
from tandem.deploy.topology import ProcessRole, ProcessSpec

Result = TypeVar("Result")

_TAKE_BACK_S = 5.0

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True)
class Loading:
    name: str


@dataclass(frozen=True, slots=True)
class Up:
    info: ProcessInfo
    load_s: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The process died, left, or could not be started again; the next try is after `retry_s`. `failures`: in a row,
    0 for a process that was told to end. An error of the first start is raised by `reconcile` instead."""

    name: str
    reason: str
    retry_s: float
    failures: int = 1


@dataclass(frozen=True, slots=True)
class Stopped:
    name: str


Event = Loading | Up | Failed | Stopped


@dataclass(frozen=True, slots=True)
class Backoff:
    first_s: float = 0.5
    longest_s: float = 30.0
    healthy_after_s: float = 60.0


@dataclass(slots=True)
class _Slot:
    """One process to keep running. `first_start` is done when the first start has succeeded, or when it has failed and
    until a later one succeeds; `is_waiting` between two starts."""

    spec: ProcessSpec
    first_start: asyncio.Future[None]
    stop_requested: asyncio.Event = field(default_factory=asyncio.Event)
    grace_s: float = 0.0
    is_waiting: bool = False
    info: ProcessInfo | None = None
    task: asyncio.Task[None] | None = None
    failures: int = 0
    note: str = ""

    @property
    def state(self) -> ProcessState:
        if self.stop_requested.is_set():
            return ProcessState.STOPPING
        if self.info is not None:
            return ProcessState.UP
        return ProcessState.WAITING if self.is_waiting else ProcessState.LOADING


class Controller:
    """Owns a set of processes; `reconcile` says which should run. `events` has all changes, in order."""

    def __init__(
        self,
        launcher: Launcher,
        clock: Clock,
        backoff: Backoff | None = None,
        watch: Watch | None = None,
        starts_first: Callable[[ProcessSpec], bool] = lambda spec: False,
    ) -> None:
        """Without `watch`, only a process that ends is replaced. `starts_first`: whether there is room for a process
        beside the one that it replaces."""
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self._launcher = launcher
        self._watch = watch
        self._clock = clock
        self._backoff = backoff or Backoff()
        self._starts_first = starts_first
        self._slots: dict[str, _Slot] = {}

    def running(self) -> tuple[ProcessInfo, ...]:
        """The processes that run now."""
        return tuple(slot.info for slot in self._slots.values() if slot.info is not None)

    def running_instances(self) -> tuple[tuple[ProcessSpec, ProcessInfo], ...]:
        """The instances among them, with what they should be."""
        slots = (slot for slot in self._slots.values() if slot.spec.role is not ProcessRole.ROUTER)
        return tuple((slot.spec, slot.info) for slot in slots if slot.info is not None)

    def status(self) -> tuple[ProcessStatus, ...]:
        """Of all processes that should run or are being stopped."""
        return tuple(_status_of(slot) for slot in self._slots.values())

    def take_back(self, left_running: Sequence[ProcessSpec]) -> None:
        """Begin to supervise what an earlier controller has left; `reconcile` then waits for it, or stops it."""
        for spec in left_running:
            self._add(spec)

    async def reconcile(
        self,
        desired: Sequence[ProcessSpec],
        grace_s: float,
        find_misplaced: Callable[[], Awaitable[Collection[str]]] | None = None,
    ) -> ClusterChange:
        """Start the missing processes, stop those that are not in `desired`, and wait for both. Then replace those that
        run with other settings, and those that `find_misplaced` names then, one after the other.

        Raises the first error of a process that could not be started yet; it is nevertheless tried again, unless the
        process that it was to replace still runs. Nothing is replaced after such an error: settings that do not work
        stop at the first process.
        """
        specs = {spec.name: spec for spec in desired}
        removed = [name for name in self._slots if name not in specs]
        added = [name for name in specs if name not in self._slots]
        changed = [name for name in specs if name in self._slots and not self._slots[name].spec.can_become(specs[name])]
        for name, spec in specs.items():
            if name in added:
                self._add(spec)
            elif name not in changed:
                self._slots[name].spec = spec
        await self._stop(removed, grace_s)
        unchanged = [self._slots[name] for name in specs if name not in changed]
        await asyncio.gather(*(asyncio.shield(slot.first_start) for slot in unchanged))
        if find_misplaced is not None:
            misplaced = await find_misplaced()
            changed += [name for name in misplaced if name in specs and name not in changed]
        for name in changed:
            if self._starts_first(specs[name]) and await self._is_up(name):
                await self._replace(specs[name], grace_s)
                continue
            await self._stop([name], grace_s)
            await asyncio.shield(self._add(specs[name]).first_start)
        return ClusterChange(tuple(added), tuple(removed), tuple(changed))

    async def stop(self, grace_s: float) -> None:
        """Stop all processes. Routers stop first, so that the requests that they have accepted can still finish."""
        routers = [name for name, slot in self._slots.items() if slot.spec.role is ProcessRole.ROUTER]
        await self._stop(routers, grace_s)
        await self._stop(list(self._slots), grace_s)

    async def kill(self) -> None:
        """End all processes at once."""
        for slot in self._slots.values():
            if slot.task is not None:
                slot.task.cancel()
        tasks = [slot.task for slot in self._slots.values() if slot.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._slots.clear()

    def _add(self, spec: ProcessSpec) -> _Slot:
        slot = _Slot(spec, asyncio.get_running_loop().create_future())
        self._slots[spec.name] = slot
        slot.task = asyncio.create_task(self._supervise(slot), name=f"supervise {spec.name}")
        return slot

    async def _is_up(self, name: str) -> bool:
        """One that is just being taken back counts."""
        slot = self._slots[name]
        await asyncio.wait((slot.first_start,), timeout=_TAKE_BACK_S)
        return slot.info is not None

    async def _replace(self, spec: ProcessSpec, grace_s: float) -> None:
        """The process that runs stops once its successor is up, and goes on if that cannot be started."""
        name, leaving = spec.name, f"{spec.name}, replaced"
        before = self._slots[leaving] = self._slots.pop(name)
        try:
            await asyncio.shield(self._add(spec).first_start)
        except TandemError:
            await self._stop([name], 0.0)
            self._slots[name] = self._slots.pop(leaving, before)
            raise
        await self._stop([leaving], grace_s)

    async def _stop(self, names: Sequence[str], grace_s: float) -> None:
        slots = {name: self._slots[name] for name in names if name in self._slots}
        for slot in slots.values():
            slot.grace_s = grace_s
            slot.stop_requested.set()
        # Whoever waits may be cancelled; the processes finish their requests all the same.
        await asyncio.gather(*(asyncio.shield(slot.task) for slot in slots.values() if slot.task is not None))
        for name in slots:
            self._slots.pop(name, None)

    async def _supervise(self, slot: _Slot) -> None:
        """Until a stop is requested; no failure ends it."""
        delay_s, failures = self._backoff.first_s, 0
        while not slot.stop_requested.is_set():
            began_s, is_restart = self._clock.now_s(), slot.first_start.done()
            end = await self._run_once(slot)
            if end is None:
                break
            if end.was_asked or self._clock.now_s() - began_s > self._backoff.healthy_after_s:
                delay_s, failures = self._backoff.first_s, 0
            failures += not end.was_asked
            slot.failures, slot.note = failures, end.reason
            if is_restart or slot.first_start.exception() is None:
                self.events.put_nowait(Failed(slot.spec.name, end.reason, delay_s, failures))
            slot.is_waiting = True
            await _wait_at_most(slot.stop_requested, delay_s)
            slot.is_waiting = False
            delay_s = min(2 * delay_s, self._backoff.longest_s)
        if not slot.first_start.done():
            slot.first_start.cancel()
        self.events.put_nowait(Stopped(slot.spec.name))

    async def _run_once(self, slot: _Slot) -> ProcessEnd | None:
        """Start the process and wait for its end; None if a stop was requested."""
        try:
            return await self._start_and_wait(slot)
        except Exception as error:  # whatever it is, the process must be tried again, and not in silence
            if not isinstance(error, TandemError):
                logger.exception("the supervision of %s failed", slot.spec.name)
                error = InternalError(f"{slot.spec.name} could not be supervised ({type(error).__name__}: {error})")
            if not slot.first_start.done():
                slot.first_start.set_exception(error)
                slot.first_start.exception()  # `reconcile` may have been cancelled; this marks the error as handled
            return ProcessEnd(error.message)

    async def _start_and_wait(self, slot: _Slot) -> ProcessEnd | None:
        """As `_run_once`, but raises what the launcher and the process raise."""
        name, began_s = slot.spec.name, self._clock.now_s()
        self.events.put_nowait(Loading(name))
        process = await _run_unless(slot.stop_requested, self._launcher.launch(slot.spec))
        if process is None:
            return None
        try:
            slot.info = process.info
            self.events.put_nowait(Up(process.info, self._clock.now_s() - began_s))
            if slot.first_start.done():
                slot.first_start = asyncio.get_running_loop().create_future()
            slot.first_start.set_result(None)
            end = await _run_unless(slot.stop_requested, wait_end(slot.spec, process, self._watch))
            if end is None:
                await process.stop(slot.grace_s)
            return end
        finally:
            slot.info = None
            await asyncio.shield(process.kill())


async def wait_end(spec: ProcessSpec, process: RunningProcess, watch: Watch | None) -> ProcessEnd:
    """The process's own end, or what `watch` finds."""
    ended = asyncio.ensure_future(process.wait_closed())
    tasks: list[asyncio.Task[Any]] = [ended]
    if watch is not None:
        tasks.append(asyncio.ensure_future(watch(spec, process)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return ended.result() if ended.done() else ProcessEnd(tasks[1].result())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _status_of(slot: _Slot) -> ProcessStatus:
    config = slot.spec.config
    role = config.role if isinstance(config, WorkerConfig) else slot.spec.role.value
    status = ProcessStatus(slot.spec.name, role, slot.state, failures=slot.failures, note=slot.note)
    if slot.info is None:
        return status
    info = slot.info
    return replace(status, pid=info.pid, address=info.address, instance_id=info.instance_id)


async def _run_unless(stop_requested: asyncio.Event, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`, or None if `stop_requested` is set first; `work` is then cancelled and has ended."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop_requested.wait())
    try:
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        stopped.cancel()
        task.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


async def _wait_at_most(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass

"""Keeps one process running: starts it, notices when it has died or makes no progress, and starts it again.

    begin --> loading --up--> running --died, stalled, left--> waiting --delay--> loading
                |  failed        |
                +--> waiting     +--stop--> stopping --> ended

The delay doubles with every failure in a row up to a limit, and is reset once a process has run for a while. There is
no limit to the number of tries: an error from outside (a full disk, a model that is being replaced) can end at any
time, and each failure is reported with its number. An instance is always replaced as a whole: the new process has a new
instance id and cannot be mistaken for the old one.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tandem.core.clock import Clock
from tandem.core.cluster_status import ProcessState, ProcessStatus
from tandem.core.config import WorkerConfig
from tandem.core.errors import InternalError, TandemError
from tandem.deploy.running_process import Launcher, ProcessEnd, ProcessInfo, RunningProcess, Watch
from tandem.deploy.topology import ProcessSpec

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


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
    0 for a process that was told to end. An error of the first start is raised by `Supervisor.wait_started` instead."""

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


class Supervisor:
    """Made on the event loop: `begin`, then `request_stop` or `cancel`. `spec` may be replaced by one that the running
    process can become; the next start uses it. `info` is None while no process runs."""

    def __init__(
        self,
        spec: ProcessSpec,
        launcher: Launcher,
        clock: Clock,
        backoff: Backoff,
        watch: Watch | None,
        report: Callable[[Event], None],
    ) -> None:
        """Without `watch`, only a process that ends is replaced. `report` gets all changes, in order."""
        self.spec = spec
        self.info: ProcessInfo | None = None
        self._launcher = launcher
        self._clock = clock
        self._backoff = backoff
        self._watch = watch
        self._report = report
        # Done when the first start has succeeded, or when it has failed and until a later one succeeds.
        self._first_start: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stop_requested = asyncio.Event()
        self._grace_s = 0.0
        self._is_waiting = False  # between two starts
        self._failures = 0
        self._note = ""
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start the process, in a task of its own."""
        self._task = asyncio.create_task(self._supervise(), name=f"supervise {self.spec.name}")

    def status(self) -> ProcessStatus:
        config = self.spec.config
        role = config.role if isinstance(config, WorkerConfig) else self.spec.role.value
        status = ProcessStatus(self.spec.name, role, self._state, failures=self._failures, note=self._note)
        if (info := self.info) is None:
            return status
        return replace(status, pid=info.pid, address=info.address, instance_id=info.instance_id)

    async def wait_started(self) -> None:
        """Until the process has run for the first time. Raises the error of its first start, until a later one
        succeeds."""
        await asyncio.shield(self._first_start)

    async def is_up(self, timeout_s: float) -> bool:
        """Whether it runs now; a first start that is in progress is waited for."""
        await asyncio.wait((self._first_start,), timeout=timeout_s)
        return self.info is not None

    def request_stop(self, grace_s: float) -> None:
        """Let the process finish its requests for up to `grace_s`; it is not started again."""
        self._grace_s = grace_s
        self._stop_requested.set()

    async def wait_ended(self) -> None:
        """After `request_stop`. A caller that is cancelled does not keep the process from finishing its requests."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def cancel(self) -> None:
        """End the process at once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def _state(self) -> ProcessState:
        if self._stop_requested.is_set():
            return ProcessState.STOPPING
        if self.info is not None:
            return ProcessState.UP
        return ProcessState.WAITING if self._is_waiting else ProcessState.LOADING

    # --- the task ----------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Until a stop is requested; no failure ends it."""
        delay_s, failures = self._backoff.first_s, 0
        while not self._stop_requested.is_set():
            began_s, is_restart = self._clock.now_s(), self._first_start.done()
            end = await self._run_once()
            if end is None:
                break
            if end.was_asked or self._clock.now_s() - began_s > self._backoff.healthy_after_s:
                delay_s, failures = self._backoff.first_s, 0
            failures += not end.was_asked
            self._failures, self._note = failures, end.reason
            if is_restart or self._first_start.exception() is None:
                self._report(Failed(self.spec.name, end.reason, delay_s, failures))
            self._is_waiting = True
            await _wait_at_most(self._stop_requested, delay_s)
            self._is_waiting = False
            delay_s = min(2 * delay_s, self._backoff.longest_s)
        if not self._first_start.done():
            self._first_start.cancel()
        self._report(Stopped(self.spec.name))

    async def _run_once(self) -> ProcessEnd | None:
        """Start the process and wait for its end; None if a stop was requested."""
        try:
            return await self._start_and_wait()
        except Exception as error:  # whatever it is, the process must be tried again, and not in silence
            name = self.spec.name
            if not isinstance(error, TandemError):
                logger.exception("the supervision of %s failed", name)
                error = InternalError(f"{name} could not be supervised ({type(error).__name__}: {error})")
            if not self._first_start.done():
                self._first_start.set_exception(error)
                self._first_start.exception()  # nobody may wait any more; this marks the error as handled
            return ProcessEnd(error.message)

    async def _start_and_wait(self) -> ProcessEnd | None:
        """As `_run_once`, but raises what the launcher and the process raise."""
        began_s = self._clock.now_s()
        self._report(Loading(self.spec.name))
        process = await _run_unless(self._stop_requested, self._launcher.launch(self.spec))
        if process is None:
            return None
        try:
            self.info = process.info
            self._report(Up(process.info, self._clock.now_s() - began_s))
            if self._first_start.done():
                self._first_start = asyncio.get_running_loop().create_future()
            self._first_start.set_result(None)
            end = await _run_unless(self._stop_requested, wait_end(self.spec, process, self._watch))
            if end is None:
                await process.stop(self._grace_s)
            return end
        finally:
            self.info = None
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

"""Keeps what should run running: starts processes, notices that one has died, starts it again.

    absent --start--> loading --up--> running --died--> waiting --delay--> loading
                        |  failed        |
                        +--> waiting     +--leave--> stopping --> absent

The delay doubles with every failure and is short again once a process has lived for a while. An instance is always
replaced as a whole: a new process with a new instance id, so that nobody takes it for the old one.

The controller knows neither Ray nor processes, only `Launcher`.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from tandem.core.clock import Clock
from tandem.core.errors import TandemError
from tandem.deploy.topology import ProcessRole, ProcessSpec

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """A process that is up. Workers' `address` is their gRPC address, the router's is its HTTP address."""

    name: str
    role: ProcessRole
    pid: int
    address: str
    instance_id: str
    log_path: str


class RunningProcess(Protocol):
    info: ProcessInfo

    async def wait_closed(self) -> str:
        """Wait until it has ended; why, for a person."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Let it finish what it has for `grace_s` at most, then end it."""
        ...

    async def kill(self) -> None:
        """End it now, and give back what it was given. Does no harm when it is gone."""
        ...


class Launcher(Protocol):
    async def launch(self, spec: ProcessSpec) -> RunningProcess:
        """Returns when the process is ready. Raises a TandemError; leaves nothing behind then, or when cancelled."""
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
    """It died, or could not be started again; it will be tried after `retry_s`. Of the very first start `reconcile`
    tells."""

    name: str
    reason: str
    retry_s: float


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
    """The place of one process. `first` is done once it was up for the first time, or has failed to be."""

    spec: ProcessSpec
    first: asyncio.Future[None]
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    grace_s: float = 0.0
    info: ProcessInfo | None = None
    task: asyncio.Task[None] | None = None


class Controller:
    """Owner of a set of processes, told which there should be. `events` tells what happens, in order."""

    def __init__(self, launcher: Launcher, clock: Clock, backoff: Backoff | None = None) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self._launcher = launcher
        self._clock = clock
        self._backoff = backoff or Backoff()
        self._slots: dict[str, _Slot] = {}

    def running(self) -> tuple[ProcessInfo, ...]:
        """The processes that are up now."""
        return tuple(slot.info for slot in self._slots.values() if slot.info is not None)

    async def reconcile(self, desired: Sequence[ProcessSpec], grace_s: float) -> None:
        """Start what is missing, stop what is not wanted, and wait until both are done.

        Raises the first error of a process that could not be started for the first time; it is tried again all the
        same. What runs already keeps running as it was started.
        """
        wanted = {spec.name: spec for spec in desired}
        leaving = [name for name in self._slots if name not in wanted]
        added = [self._add(spec) for name, spec in wanted.items() if name not in self._slots]
        await self._leave(leaving, grace_s)
        await asyncio.gather(*(asyncio.shield(slot.first) for slot in added))

    async def stop(self, grace_s: float) -> None:
        """Stop everything: routers first, so that what they have accepted can still be answered."""
        routers = [name for name, slot in self._slots.items() if slot.spec.role is ProcessRole.ROUTER]
        await self._leave(routers, grace_s)
        await self._leave(list(self._slots), grace_s)

    async def kill(self) -> None:
        """End everything at once."""
        for slot in self._slots.values():
            if slot.task is not None:
                slot.task.cancel()
        tasks = [slot.task for slot in self._slots.values() if slot.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._slots.clear()

    def _add(self, spec: ProcessSpec) -> _Slot:
        slot = _Slot(spec, asyncio.get_running_loop().create_future())
        self._slots[spec.name] = slot
        slot.task = asyncio.create_task(self._keep(slot), name=f"keep {spec.name}")
        return slot

    async def _leave(self, names: Sequence[str], grace_s: float) -> None:
        slots = [self._slots[name] for name in names if name in self._slots]
        for slot in slots:
            slot.grace_s = grace_s
            slot.leaving.set()
        await asyncio.gather(*(slot.task for slot in slots if slot.task is not None))
        for slot in slots:
            self._slots.pop(slot.spec.name, None)

    async def _keep(self, slot: _Slot) -> None:
        delay_s = self._backoff.first_s
        while not slot.leaving.is_set():
            began_s, is_known = self._clock.now_s(), slot.first.done()
            reason = await self._run_once(slot)
            if reason is None:
                break
            if self._clock.now_s() - began_s > self._backoff.healthy_after_s:
                delay_s = self._backoff.first_s
            if is_known or slot.first.exception() is None:
                self.events.put_nowait(Failed(slot.spec.name, reason, delay_s))
            await _wait_at_most(slot.leaving, delay_s)
            delay_s = min(2 * delay_s, self._backoff.longest_s)
        if not slot.first.done():
            slot.first.cancel()
        self.events.put_nowait(Stopped(slot.spec.name))

    async def _run_once(self, slot: _Slot) -> str | None:
        """One life of the process. Why it ended, or None if it was asked to leave."""
        name, began_s = slot.spec.name, self._clock.now_s()
        self.events.put_nowait(Loading(name))
        try:
            process = await _unless(slot.leaving, self._launcher.launch(slot.spec))
        except TandemError as error:
            if not slot.first.done():
                slot.first.set_exception(error)
                slot.first.exception()  # someone may have stopped waiting for it
            return error.message
        if process is None:
            return None
        try:
            slot.info = process.info
            self.events.put_nowait(Up(process.info, self._clock.now_s() - began_s))
            if not slot.first.done():
                slot.first.set_result(None)
            reason = await _unless(slot.leaving, process.wait_closed())
            if reason is None:
                await process.stop(slot.grace_s)
            return reason
        finally:
            slot.info = None
            await asyncio.shield(process.kill())


async def _unless(leaving: asyncio.Event, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What `work` returns, or None if `leaving` is set first; `work` is then cancelled and has ended."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(leaving.wait())
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        left.cancel()
        task.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _wait_at_most(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass

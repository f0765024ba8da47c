"""Keeps a set of processes running, each by a `Supervisor`, and changes the set to what should run.

The controller depends on the interfaces `Launcher` and `Watch` only, not on Ray.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence

from tandem.core.clock import Clock
from tandem.core.cluster_status import ClusterChange, ProcessStatus
from tandem.core.errors import TandemError
from tandem.deploy.running_process import Launcher, ProcessInfo, Watch
from tandem.deploy.supervisor import Backoff, Event, Supervisor
from tandem.deploy.topology import ProcessRole, ProcessSpec

_TAKE_BACK_S = 5.0


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
        self._supervisors: dict[str, Supervisor] = {}

    def running(self) -> tuple[ProcessInfo, ...]:
        """The processes that run now."""
        return tuple(info for _, info in self._running())

    def running_instances(self) -> tuple[tuple[ProcessSpec, ProcessInfo], ...]:
        """The instances among them, with what they should be."""
        return tuple((spec, info) for spec, info in self._running() if spec.role is not ProcessRole.ROUTER)

    def status(self) -> tuple[ProcessStatus, ...]:
        """Of all processes that should run or are being stopped."""
        return tuple(supervisor.status() for supervisor in self._supervisors.values())

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
        known = dict(self._supervisors)
        removed = [name for name in known if name not in specs]
        added = [name for name in specs if name not in known]
        changed = [name for name in specs if name in known and not known[name].spec.can_become(specs[name])]
        for name, spec in specs.items():
            if name in added:
                self._add(spec)
            elif name not in changed:
                known[name].spec = spec
        await self._stop(removed, grace_s)
        unchanged = [self._supervisors[name] for name in specs if name not in changed]
        await asyncio.gather(*(supervisor.wait_started() for supervisor in unchanged))
        if find_misplaced is not None:
            misplaced = await find_misplaced()
            changed += [name for name in misplaced if name in specs and name not in changed]
        for name in changed:
            if self._starts_first(specs[name]) and await self._supervisors[name].is_up(_TAKE_BACK_S):
                await self._replace(specs[name], grace_s)
                continue
            await self._stop([name], grace_s)
            await self._add(specs[name]).wait_started()
        return ClusterChange(tuple(added), tuple(removed), tuple(changed))

    async def stop(self, grace_s: float) -> None:
        """Stop all processes. Routers stop first, so that the requests that they have accepted can still finish."""
        supervisors = self._supervisors
        await self._stop([name for name, each in supervisors.items() if each.spec.role is ProcessRole.ROUTER], grace_s)
        await self._stop(list(supervisors), grace_s)

    async def kill(self) -> None:
        """End all processes at once."""
        await asyncio.gather(*(supervisor.cancel() for supervisor in self._supervisors.values()))
        self._supervisors.clear()

    def _running(self) -> list[tuple[ProcessSpec, ProcessInfo]]:
        return [(each.spec, each.info) for each in self._supervisors.values() if each.info is not None]

    def _add(self, spec: ProcessSpec) -> Supervisor:
        supervisor = Supervisor(spec, self._launcher, self._clock, self._backoff, self._watch, self.events.put_nowait)
        self._supervisors[spec.name] = supervisor
        supervisor.begin()
        return supervisor

    async def _replace(self, spec: ProcessSpec, grace_s: float) -> None:
        """The process that runs stops once its successor is up, and goes on if that cannot be started."""
        name, leaving = spec.name, f"{spec.name}, replaced"
        before = self._supervisors[leaving] = self._supervisors.pop(name)
        try:
            await self._add(spec).wait_started()
        except TandemError:
            await self._stop([name], 0.0)
            self._supervisors[name] = self._supervisors.pop(leaving, before)
            raise
        await self._stop([leaving], grace_s)

    async def _stop(self, names: Sequence[str], grace_s: float) -> None:
        supervisors = {name: self._supervisors[name] for name in names if name in self._supervisors}
        for supervisor in supervisors.values():
            supervisor.request_stop(grace_s)
        await asyncio.gather(*(supervisor.wait_ended() for supervisor in supervisors.values()))
        for name in supervisors:
            self._supervisors.pop(name, None)

"""Finds running processes that make no progress: stopped, hung, or ill by their own report.

A process is asked for its health several times a second. One that does not answer may only be slow, so the kernel is
asked as well what its threads do:

    stopped     (SIGSTOP) it will not answer: it is replaced after `stopped_s`
    waiting     no thread computes or waits for a core: after `silence_s`
    computing   it may be slow, on a machine at full load: after `busy_s`
    answers that it does not serve, on end: after `not_serving_s`

Only time in which this process itself was on time counts: when it was stopped or starved, nobody is blamed for that
time, and what was known before stays known. What drains is not asked.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tandem.core.clock import Clock
from tandem.core.config import RouterConfig
from tandem.deploy.running_process import RunningProcess, Watch
from tandem.deploy.topology import ProcessSpec
from tandem.wire.channels import LastingChannel
from tandem.wire.health import check_health


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. `late_s`: a question that takes so much longer than it may was delayed by ourselves."""

    period_s: float = 0.25
    probe_s: float = 0.5
    stopped_s: float = 1.0
    silence_s: float = 1.5
    busy_s: float = 15.0
    not_serving_s: float = 5.0
    late_s: float = 0.5


class Activity(Enum):
    STOPPED = "stopped"
    WAITING = "waiting"
    COMPUTING = "computing"


def watch_health(clock: Clock, patience: Patience | None = None) -> Watch:
    """A `Watch` that asks the health service of each process on its gRPC port; of the router, on its control port."""

    async def watch(spec: ProcessSpec, process: RunningProcess) -> str:
        config = spec.config
        address = config.router.control if isinstance(config, RouterConfig) else process.info.address
        limits = patience or Patience()
        activity = ThreadActivity(process.info.pid)
        async with LastingChannel(address, tls=config.cluster_tls) as channel:

            async def ask() -> bool | None:
                return await check_health(await channel.get(), limits.probe_s)

            return await wait_stalled(
                ask,
                activity.read,
                lambda: process.is_draining,
                clock,
                limits,
            )

    return watch


async def wait_stalled(
    ask: Callable[[], Awaitable[bool | None]],
    read_activity: Callable[[], Activity],
    is_draining: Callable[[], bool],
    clock: Clock,
    patience: Patience,
) -> str:
    """Returns, in words, why the process makes no progress. `ask` tells whether it serves, None for no answer within
    `probe_s`; `read_activity` is what it has done since the last call."""
    counted_s = progress_s = answered_s = served_s = stopped_since_s = 0.0
    while True:
        began_s = clock.now_s()
        serves = await ask()
        activity = read_activity()
        asked_s = clock.now_s() - began_s
        counted_s += min(asked_s, patience.probe_s) if asked_s <= patience.probe_s + patience.late_s else 0.0
        if is_draining():
            progress_s = answered_s = served_s = stopped_since_s = counted_s
        if serves is not None:
            progress_s = answered_s = counted_s
        if serves is not False:
            served_s = counted_s
        if activity is not Activity.STOPPED:
            stopped_since_s = counted_s
        if activity is Activity.COMPUTING:
            progress_s = counted_s
        if counted_s - stopped_since_s >= patience.stopped_s:
            return f"it is stopped, as by SIGSTOP, for {counted_s - stopped_since_s:.1f} s"
        if counted_s - progress_s >= patience.silence_s:
            return f"it has not answered for {counted_s - answered_s:.1f} s and computes nothing"
        if counted_s - answered_s >= patience.busy_s:
            return f"it has not answered for {counted_s - answered_s:.1f} s"
        if counted_s - served_s >= patience.not_serving_s:
            return f"it has reported for {counted_s - served_s:.1f} s that it makes no progress"
        await asyncio.sleep(patience.period_s)
        counted_s += patience.period_s


class ThreadActivity:
    """What the threads of a process do, by /proc."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        self._cpu_ticks = 0

    def read(self) -> Activity:
        """Since the last call. WAITING for a process that has ended."""
        try:
            state, ticks = _state_and_ticks(self._folder)
            states = {_state_and_ticks(self._folder / "task" / thread)[0] for thread in self._threads()}
        except (OSError, ValueError):
            return Activity.WAITING
        has_computed, self._cpu_ticks = ticks != self._cpu_ticks, ticks
        if state == "T":
            return Activity.STOPPED
        return Activity.COMPUTING if has_computed or states & {"R", "D"} else Activity.WAITING

    def _threads(self) -> list[str]:
        return os.listdir(self._folder / "task")


def _state_and_ticks(folder: Path) -> tuple[str, int]:
    """State letter, and processor time in ticks, from `stat`. The name before them may hold spaces and brackets."""
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12])

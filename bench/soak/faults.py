"""Kills and stalls of the processes of a cluster, one every now and then."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from bench.common.served import ServedProcess

LONG_STALL_S = 6.0  # it is found, and the process replaced
SHORT_STALL_S = (0.3, 1.2)  # no reason to replace anything
UP_AGAIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Fault:
    """`up_again_s`: after how long a process of that name ran again, None if not in time; 0 for a short stall."""

    at_s: float
    what: str
    name: str
    pid: int
    up_again_s: float | None


class FaultInjector:
    """The first instance of each role, and the router, are only stalled for a moment: what they hold is measured over
    the whole run. The others are killed, and stalled for longer."""

    def __init__(self, processes: Callable[[], list[ServedProcess]], period_s: float, seed: int) -> None:
        self.done: list[Fault] = []
        self._processes = processes
        self._period_s = period_s
        self._random = Random(seed)
        self._began_s = time.monotonic()

    async def run(self) -> None:
        """Until cancelled; a process that is stopped then is continued."""
        while True:
            await asyncio.sleep(self._period_s)
            served = self._random.choice(self._processes())
            is_spared = served.name.endswith("-0") or "router" in served.name
            if is_spared:
                await self.stall(served, self._random.uniform(*SHORT_STALL_S))
            elif self._random.random() < 0.5:
                await self.kill(served)
            else:
                await self.stall(served, LONG_STALL_S)

    async def kill(self, served: ServedProcess) -> None:
        began_s = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(served.pid, signal.SIGKILL)
        self._add("killed", served, began_s, await self._wait_for_another(served))

    async def stall(self, served: ServedProcess, for_s: float) -> None:
        began_s = time.monotonic()
        with contextlib.suppress(ProcessLookupError):  # it may be replaced meanwhile
            os.kill(served.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(for_s)
            finally:
                os.kill(served.pid, signal.SIGCONT)
        self._add(f"stopped for {for_s:.1f} s", served, began_s, 0.0)

    async def _wait_for_another(self, served: ServedProcess) -> float | None:
        began_s = time.monotonic()
        while time.monotonic() - began_s < UP_AGAIN_S:
            if any(each.name == served.name and each.pid != served.pid for each in self._processes()):
                return time.monotonic() - began_s
            await asyncio.sleep(0.1)
        return None

    def _add(self, what: str, served: ServedProcess, began_s: float, up_again_s: float | None) -> None:
        self.done.append(Fault(began_s - self._began_s, what, served.name, served.pid, up_again_s))

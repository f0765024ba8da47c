"""An event loop on which waiting takes no time: whenever nothing is left to do, the clock jumps to the next timer."""

import asyncio
import heapq
from typing import Any


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """For code that waits for timers and for itself only, not for sockets."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        loop: Any = self  # the names below are of asyncio.base_events.BaseEventLoop
        timers = loop._scheduled
        while timers and timers[0]._cancelled:
            loop._timer_cancelled_count -= 1
            heapq.heappop(timers)._scheduled = False
        if timers and not loop._ready:
            self._now_s = max(self._now_s, timers[0].when())
        super()._run_once()  # type: ignore[misc]


class LoopClock:
    """A `core.clock.Clock` that shows the running loop's time."""

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

"""Whether this process ran lately: who did not run must not conclude that others are gone."""

import asyncio
from collections import deque

from tandem.core.clock import Clock

LOOK_S = 0.1
KEPT_S = 4.0


class OwnDelays:
    """How late the event loop was, in looks of `watch`. While the process is stopped, or has no core, nothing in it
    reads what others send, and all its time-outs pass."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due_s: float | None = None  # when the next look should be
        self._late: deque[tuple[float, float]] = deque()  # when a look was, and how late

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            self._due_s = self._clock.now_s() + LOOK_S
            await asyncio.sleep(LOOK_S)
            now_s = self._clock.now_s()
            self._late.append((now_s, now_s - self._due_s))
            while self._late[0][0] < now_s - KEPT_S:
                self._late.popleft()

    def longest_s(self, within_s: float) -> float:
        """The longest delay that ended in the last `within_s`, at most `KEPT_S`, or has not ended yet."""
        now_s = self._clock.now_s()
        present_s = 0.0 if self._due_s is None else now_s - self._due_s
        return max([present_s, 0.0, *(late_s for at_s, late_s in self._late if at_s >= now_s - within_s)])

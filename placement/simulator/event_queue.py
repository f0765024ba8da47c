"""What happens next on the virtual clock."""

import heapq
from collections.abc import Callable
from typing import Any

_LAST = 1 << 62


class EventQueue:
    """Calls in order of time; at equal times in the order in which they were entered, steps' ends last.

    So what arrives at the very moment at which a step ends takes part in the next one, and a run repeats exactly.
    """

    __slots__ = ("_heap", "_next", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._next = 0

    def at(self, time_s: float, action: Callable[[Any], None], argument: Any) -> None:
        """`action(argument)` at `time_s`, which is not in the past."""
        self._next += 1
        heapq.heappush(self._heap, (time_s, self._next, action, argument))

    def at_step_end(self, time_s: float, action: Callable[[Any], None], argument: Any) -> None:
        """As `at`, after everything else of that moment."""
        self._next += 1
        heapq.heappush(self._heap, (time_s, _LAST + self._next, action, argument))

    def next_s(self) -> float:
        """When the next call is due; inf if none is."""
        return self._heap[0][0] if self._heap else float("inf")

    def run_next(self) -> None:
        """Advance the clock to the next call and make it."""
        self.now_s, _, action, argument = heapq.heappop(self._heap)
        action(argument)

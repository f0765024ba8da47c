"""Time as an argument: whoever needs the time is given a clock."""

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds. The zero means nothing; only differences do."""

    def now_s(self) -> float: ...


class SystemClock:
    """The machine's monotonic clock: a change of the wall clock does not move it."""

    def now_s(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that stands still until it is told to move; for tests and replays."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        assert seconds >= 0.0, "time does not run backwards"
        self._now_s += seconds

"""Clocks. Code that needs the time gets a clock as an argument."""

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds since an arbitrary moment."""

    def now_s(self) -> float: ...


class SystemClock:
    """The machine's monotonic clock; changes of the wall clock have no effect."""

    def now_s(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that only `advance` moves; for tests and replays."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        assert seconds >= 0.0, "time does not run backwards"
        self._now_s += seconds

"""How fast requests leave the router's queue, and how long an instance takes to a first token: both as measured."""

import math

RATE_MEMORY_S = 10.0  # of waiting; what was measured longer ago hardly counts
_MEMORY_REQUESTS = 20  # of times to a first token; the weight of older ones falls to 1/e


class DrainRate:
    """Prompt tokens that leave the queue per second while something waits. Older measurements fade exponentially.

    Time without anybody waiting does not count: it says nothing of what the instances can do.
    """

    __slots__ = ("_busy_s", "_since_s", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0.0
        self._busy_s = 0.0
        self._since_s: float | None = None  # None: nobody waits

    def begin(self, now_s: float) -> None:
        """Somebody waits from now on."""
        self._since_s = now_s

    def end(self, now_s: float) -> None:
        """Nobody waits any more."""
        self._pass_time(now_s)
        self._since_s = None

    def left(self, num_tokens: int, now_s: float) -> None:
        """A prompt of that length has left the queue for an instance."""
        self._pass_time(now_s)
        self._tokens += num_tokens

    def tokens_per_s(self, now_s: float) -> float | None:
        """None: not measured for long enough, or nothing has left."""
        self._pass_time(now_s)
        return self._tokens / self._busy_s if self._busy_s >= 1.0 and self._tokens else None

    def _pass_time(self, now_s: float) -> None:
        if self._since_s is None:
            return
        passed_s = now_s - self._since_s
        fade = math.exp(-passed_s / RATE_MEMORY_S)
        self._tokens *= fade
        self._busy_s = self._busy_s * fade + RATE_MEMORY_S * (1 - fade)
        self._since_s = now_s


class FirstTokenTime:
    """Seconds from a dispatch to the first token, in proportion to the prompt: the mean of the last requests."""

    __slots__ = ("_seconds", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        fade = 1 - 1 / _MEMORY_REQUESTS
        self._tokens = self._tokens * fade + num_tokens
        self._seconds = self._seconds * fade + seconds

    def expected_s(self, num_tokens: int) -> float:
        """0: nothing is measured yet."""
        return num_tokens * self._seconds / self._tokens if self._tokens else 0.0

"""Measured rates: how fast prompts leave the router's queue, and how long instances take to a first token."""

import math

RATE_MEMORY_S = 10.0  # the weight of a measurement falls to 1/e in this time
_MEMORY_REQUESTS = 20  # the weight of a time to first token falls to 1/e after this many others


class DrainRate:
    """Prompt tokens that leave the queue per second while requests wait. Older measurements fade exponentially.

    Time with an empty queue does not count: it says nothing about the capacity of the instances.
    """

    __slots__ = ("_busy_s", "_since_s", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0.0
        self._busy_s = 0.0
        self._since_s: float | None = None  # time of the last update; None: the queue is empty

    def begin(self, now_s: float) -> None:
        """The queue is no longer empty."""
        self._since_s = now_s

    def end(self, now_s: float) -> None:
        """The queue is empty."""
        self._pass_time(now_s)
        self._since_s = None

    def left(self, num_tokens: int, now_s: float) -> None:
        """A prompt of that length has left the queue for an instance."""
        self._pass_time(now_s)
        self._tokens += num_tokens

    def tokens_per_s(self, now_s: float) -> float | None:
        """None: measured for less than a second, or no prompt has left."""
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
    """Mean seconds from dispatch to first token of recent requests, in proportion to the length of the prompt."""

    __slots__ = ("_seconds", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A prompt of `num_tokens` took `seconds` to its first token."""
        fade = 1 - 1 / _MEMORY_REQUESTS
        self._tokens = self._tokens * fade + num_tokens
        self._seconds = self._seconds * fade + seconds

    def expected_s(self, num_tokens: int) -> float:
        """For a prompt of `num_tokens`; 0: nothing is measured yet."""
        return num_tokens * self._seconds / self._tokens if self._tokens else 0.0

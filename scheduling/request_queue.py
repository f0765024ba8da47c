"""Requests that wait in the router until an instance has credit, and how long a newcomer would wait behind them."""

import math

from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.routed_request import RoutedRequest

RATE_MEMORY_S = 10.0  # of waiting; what was measured longer ago hardly counts


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


class RequestQueue:
    """First come, first served. A request that comes back after a failure has its old place."""

    def __init__(self) -> None:
        self.num_tokens = 0  # of the prompts that wait
        self._order: KeyedHeap[RoutedRequest] = KeyedHeap()
        self._patience: KeyedHeap[RoutedRequest] = KeyedHeap()  # until when each of them waits
        self._rate = DrainRate()

    def __len__(self) -> int:
        return len(self._order)

    @property
    def first(self) -> RoutedRequest | None:
        found = self._order.peek()
        return None if found is None else found[1]

    @property
    def next_end_s(self) -> float:
        """When the first of them has waited for too long."""
        found = self._patience.peek()
        return math.inf if found is None else found[0]

    def push(self, request: RoutedRequest, until_s: float, now_s: float) -> None:
        """It waits, at most until then (inf: for as long as it takes)."""
        if not self._order:
            self._rate.begin(now_s)
        self._order.push(request, request.number)
        if until_s < math.inf:
            self._patience.push(request, until_s)
        self.num_tokens += request.num_tokens

    def dispatch(self, request: RoutedRequest, now_s: float) -> None:
        """An instance takes it."""
        self._rate.left(request.num_tokens, now_s)
        self.discard(request, now_s)

    def discard(self, request: RoutedRequest, now_s: float) -> None:
        """It waits no longer; one that does not wait is ignored."""
        if request not in self._order:
            return
        self._order.discard(request)
        self._patience.discard(request)
        self.num_tokens -= request.num_tokens
        if not self._order:
            self._rate.end(now_s)

    def pop_impatient(self, now_s: float) -> list[RoutedRequest]:
        """Take out those that have waited for too long."""
        taken = []
        while (found := self._patience.peek()) is not None and found[0] <= now_s:
            self.discard(found[1], now_s)
            taken.append(found[1])
        return taken

    def expected_wait_s(self, now_s: float) -> float:
        """Of a newcomer, at the pace of late; 0 if nobody waits or nothing was measured yet."""
        rate = self._rate.tokens_per_s(now_s) if self._order else None
        return 0.0 if rate is None else self.num_tokens / rate

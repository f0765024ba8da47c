"""Profile of a router's recent requests: arrival times and samples of lengths.

    window 0            window 1            window 2
    |-------------------|-------------------|-----------
      closed, dropped     closed: snapshot    filling

Windows do not overlap, so two windows are independent samples. A window holds counts, moments and a uniform sample
(Vitter, "Random Sampling with a Reservoir", 1985, algorithm R): no text, no token ids, bounded memory.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random


@dataclass(frozen=True, slots=True)
class ProfileSnapshot:
    """One closed window. The tuples of tokens and classes have one entry per sampled request, in arbitrary order.
    `arrival_s` has the first arrivals of the window in ascending order, in seconds from the window's start.

    `rate` counts arrivals per second, refused requests included. `arrival_cv` is the coefficient of variation of the
    times between arrivals, 1 for fewer than three arrivals. `finished` counts requests with a complete response; the
    sample is drawn from these. `output_tokens` counts all tokens of a response, `cached_tokens` the prompt tokens that
    were in a prefix cache.
    """

    window: int
    window_s: float
    arrivals: int
    arrival_cv: float
    finished: int
    arrival_s: tuple[float, ...]
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    cached_tokens: tuple[int, ...]
    slo_class: tuple[int, ...]

    @property
    def rate(self) -> float:
        return self.arrivals / self.window_s

    @classmethod
    def pooled(cls, snapshots: Sequence["ProfileSnapshot"]) -> "ProfileSnapshot":
        """Several consecutive windows, at least one, as one window with a larger sample. `arrival_cv` is the mean of
        the windows. Kept arrivals of the windows follow each other without a gap."""
        last = snapshots[-1]
        arrivals = sum(snapshot.arrivals for snapshot in snapshots)
        began_s = list(itertools.accumulate((snapshot.kept_s for snapshot in snapshots), initial=0.0))
        return cls(
            window=last.window,
            window_s=sum(snapshot.window_s for snapshot in snapshots),
            arrivals=arrivals,
            arrival_cv=sum(snapshot.arrival_cv for snapshot in snapshots) / len(snapshots),
            finished=sum(snapshot.finished for snapshot in snapshots),
            arrival_s=tuple(
                at_s + offset_s
                for snapshot, offset_s in zip(snapshots, began_s, strict=False)
                for at_s in snapshot.arrival_s
            ),
            prompt_tokens=tuple(itertools.chain.from_iterable(snapshot.prompt_tokens for snapshot in snapshots)),
            output_tokens=tuple(itertools.chain.from_iterable(snapshot.output_tokens for snapshot in snapshots)),
            cached_tokens=tuple(itertools.chain.from_iterable(snapshot.cached_tokens for snapshot in snapshots)),
            slo_class=tuple(itertools.chain.from_iterable(snapshot.slo_class for snapshot in snapshots)),
        )

    @property
    def kept_s(self) -> float:
        """Seconds from the window's start that `arrival_s` covers."""
        return self.window_s if len(self.arrival_s) == self.arrivals else self.arrival_s[-1]


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """`prompt_tokens` and `output_tokens` are at least 1. `slo_class` is an index into the SLO classes."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    slo_class: int = 0


@dataclass(slots=True)
class _Window:
    number: int
    began_s: float
    arrivals: int = 0
    arrival_s: list[float] = field(default_factory=list)
    last_arrival_s: float = 0.0
    gaps: int = 0
    gaps_s: float = 0.0
    squared_gaps: float = 0.0
    finished: int = 0
    sample: list[ServedRequest] = field(default_factory=list)

    def arrival_cv(self) -> float:
        if self.gaps < 2 or self.gaps_s <= 0.0:
            return 1.0
        mean_s = self.gaps_s / self.gaps
        return float(max(0.0, self.squared_gaps / self.gaps - mean_s**2) ** 0.5 / mean_s)


class WorkloadProfile:
    """Counts arrivals and finished requests in constant time. A window keeps at most `capacity` sampled requests and
    `capacity` arrivals.

    A window lasts at least `window_s`, and until it has `min_requests` finished requests. Times are monotonic seconds
    of one clock and never decrease.
    """

    def __init__(
        self, *, window_s: float, random: Random, now_s: float, capacity: int = 2048, min_requests: int = 100
    ) -> None:
        assert window_s > 0
        assert 1 <= min_requests <= capacity
        self._window_s = window_s
        self._capacity = capacity
        self._min_requests = min_requests
        self._draw = random.random
        self._filling = _Window(0, now_s)
        self._closed: tuple[_Window, float] | None = None  # with its length in seconds

    def arrived(self, now_s: float) -> None:
        """A valid request has arrived. Requests that are refused because of load count, too."""
        window = self._at(now_s)
        if window.arrivals:
            gap_s = now_s - window.last_arrival_s
            window.gaps += 1
            window.gaps_s += gap_s
            window.squared_gaps += gap_s * gap_s
        window.arrivals += 1
        window.last_arrival_s = now_s
        if len(window.arrival_s) < self._capacity:
            window.arrival_s.append(now_s - window.began_s)

    def finished(self, request: ServedRequest, now_s: float) -> None:
        """A request has ended with a complete response."""
        window = self._at(now_s)
        window.finished += 1
        if len(window.sample) < self._capacity:
            window.sample.append(request)
        else:
            place = int(self._draw() * window.finished)
            if place < self._capacity:
                window.sample[place] = request

    def snapshot(self, now_s: float) -> ProfileSnapshot | None:
        """The last closed window; None before the first window has closed."""
        self._at(now_s)
        if self._closed is None:
            return None
        window, window_s = self._closed
        return ProfileSnapshot(
            window=window.number,
            window_s=window_s,
            arrivals=window.arrivals,
            arrival_cv=window.arrival_cv(),
            finished=window.finished,
            arrival_s=tuple(window.arrival_s),
            prompt_tokens=tuple(request.prompt_tokens for request in window.sample),
            output_tokens=tuple(request.output_tokens for request in window.sample),
            cached_tokens=tuple(request.cached_tokens for request in window.sample),
            slo_class=tuple(request.slo_class for request in window.sample),
        )

    def _at(self, now_s: float) -> _Window:
        """The window of `now_s`; closes the previous window if it is complete."""
        window = self._filling
        lasted_s = now_s - window.began_s
        if lasted_s >= self._window_s and window.finished >= self._min_requests:
            self._closed = (window, lasted_s)
            self._filling = window = _Window(window.number + 1, now_s)
        return window

"""Times between deliveries of a request's tokens: what a reader of a stream sees as its pace."""

from bisect import bisect_left
from itertools import accumulate

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class TokenGaps:
    """A histogram. Tokens that come together have no gap between them."""

    __slots__ = ("_counts", "_last_s", "longest_s", "sum_s")

    def __init__(self) -> None:
        self.sum_s = 0.0
        self.longest_s = 0.0
        self._counts = [0] * (len(BUCKETS_S) + 1)
        self._last_s: float | None = None

    def delivered(self, now_s: float) -> None:
        """Tokens are here now."""
        if self._last_s is not None:
            gap_s = now_s - self._last_s
            self._counts[bisect_left(BUCKETS_S, gap_s)] += 1
            self.sum_s += gap_s
            self.longest_s = max(self.longest_s, gap_s)
        self._last_s = now_s

    def merge(self, other: "TokenGaps") -> None:
        """Add the gaps of another request."""
        self._counts = [mine + theirs for mine, theirs in zip(self._counts, other._counts, strict=True)]
        self.sum_s += other.sum_s
        self.longest_s = max(self.longest_s, other.longest_s)

    def cumulative_counts(self) -> list[int]:
        """Gaps of at most each of `BUCKETS_S`, and then all."""
        return list(accumulate(self._counts))

"""A priority queue whose entries can be looked up, changed and removed by key."""

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_COMPACT_FROM = 64


class KeyedHeap(Generic[K]):
    """Lowest priority first; with equal priorities the key that was pushed first.

    Push, pop and discard are O(log n) amortized. Removed entries stay in the heap until they reach its top, or until
    they outnumber the others.
    """

    __slots__ = ("_entries", "_heap", "_next")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, K]] = []
        self._entries: dict[K, tuple[float, int]] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[K]:
        """In no particular order; the heap must not change meanwhile."""
        return iter(self._entries)

    def push(self, key: K, priority: float) -> None:
        """Add `key`, or change its priority."""
        self._entries[key] = (priority, self._next)
        heapq.heappush(self._heap, (priority, self._next, key))
        self._next += 1
        self._compact()

    def discard(self, key: K) -> None:
        """Remove `key`; no effect if it is unknown."""
        if self._entries.pop(key, None) is not None:
            self._compact()

    def peek(self) -> tuple[float, K] | None:
        """(priority, key) of the first entry, None when empty."""
        while self._heap:
            priority, number, key = self._heap[0]
            if self._entries.get(key) == (priority, number):
                return priority, key
            heapq.heappop(self._heap)
        return None

    def pop(self) -> K:
        """Remove and return the first key. The heap must not be empty."""
        first = self.peek()
        assert first is not None, "pop from an empty heap"
        heapq.heappop(self._heap)
        del self._entries[first[1]]
        return first[1]

    def pop_until(self, priority: float) -> list[K]:
        """Remove and return the keys whose priority is at most `priority`, lowest first."""
        taken = []
        while (first := self.peek()) is not None and first[0] <= priority:
            taken.append(self.pop())
        return taken

    def _compact(self) -> None:
        if len(self._heap) > _COMPACT_FROM and len(self._heap) > 2 * len(self._entries):
            self._heap = [(priority, number, key) for key, (priority, number) in self._entries.items()]
            heapq.heapify(self._heap)

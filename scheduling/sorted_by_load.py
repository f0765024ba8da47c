"""Instances in the order of their load, which changes often."""

from bisect import bisect_left, insort
from collections.abc import Iterator

Entry = tuple[float, int, str]  # load, turn, instance id


class SortedByLoad:
    """Least load first; with equal loads the lowest turn, then the lowest id.

    A sorted list: `put` and `discard` find a place in O(log n), and moving the entries behind it takes less time than
    that search for thousands of entries. `sortedcontainers` is slower.
    """

    __slots__ = ("_entries", "_of")

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._of: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """Least load first. The entries must not change meanwhile."""
        return iter(self._entries)

    def entry(self, instance_id: str) -> Entry:
        return self._of[instance_id]

    def put(self, instance_id: str, load: float, turn: int) -> None:
        """Add the instance, or move it to its new place."""
        entry = (load, turn, instance_id)
        if self._of.get(instance_id) == entry:
            return
        self.discard(instance_id)
        self._of[instance_id] = entry
        insort(self._entries, entry)

    def discard(self, instance_id: str) -> None:
        """Remove the instance; no effect if it is unknown."""
        entry = self._of.pop(instance_id, None)
        if entry is not None:
            del self._entries[bisect_left(self._entries, entry)]

    def up_to(self, load: float) -> int:
        """Number of instances with at most this load; they are the first ones."""
        return bisect_left(self._entries, (load, _AFTER_ALL_TURNS, ""))


_AFTER_ALL_TURNS = 1 << 62

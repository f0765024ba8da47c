"""Names in order of a number that changes often."""

from bisect import bisect_left, insort
from collections.abc import Iterator

Entry = tuple[float, int, str]  # load, turn, instance id


class SortedByLoad:
    """Instances, least load first; among equals the one with the lowest turn, then the lowest id.

    A sorted list: `put` and `discard` find their place in O(log n) and then move what stands behind it, which for
    thousands of entries is less than the search itself (and than `sortedcontainers` takes). Reading from the front
    costs nothing.
    """

    __slots__ = ("_entries", "_of")

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._of: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """Least load first. Nothing may be put or discarded meanwhile."""
        return iter(self._entries)

    def entry(self, instance_id: str) -> Entry:
        return self._of[instance_id]

    def put(self, instance_id: str, load: float, turn: int) -> None:
        """Enter it, or move it to its new place."""
        entry = (load, turn, instance_id)
        if self._of.get(instance_id) == entry:
            return
        self.discard(instance_id)
        self._of[instance_id] = entry
        insort(self._entries, entry)

    def discard(self, instance_id: str) -> None:
        entry = self._of.pop(instance_id, None)
        if entry is not None:
            del self._entries[bisect_left(self._entries, entry)]

    def up_to(self, load: float) -> int:
        """How many, from the front, have at most this load."""
        return bisect_left(self._entries, (load, _AFTER_ALL_TURNS, ""))


_AFTER_ALL_TURNS = 1 << 62

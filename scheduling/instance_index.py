"""What a router knows of thousands of instances, kept in order, so that a choice need not compare them all.

Both indexes (`prefill_index`, `decode_index`) give exactly the winner of `scheduling.routing`'s full comparison, at the
price of a few look-ups:

    index.put(view)      an instance is there, or its load has changed
    index.remove(id)     it is gone
    index.best(...)      the winner with its score, None if no instance can take the request
    index.select(...)    the same as a `Selection`: with the comparison to the next few, or why there is none
    index.take(view)     as `put`, of the winner: among equals it is another's turn next

Instances in `avoid` are a last resort, those in `exclude` are none. `failures` are of the few instances that failed
lately. Where KV may move inside a node only, let the fingerprints name the node, too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set
from types import MappingProxyType
from typing import Generic, TypeVar

from tandem.scheduling.routing import DecodeView, PrefillView, Scored, Selection, selection_of

NO_INSTANCES: Set[str] = frozenset()
NO_FAILURES: Mapping[str, float] = MappingProxyType({})
SHOWN = 3  # candidates of a selection that are written down

ViewT = TypeVar("ViewT", PrefillView, DecodeView)
QueryT = TypeVar("QueryT")


class InstanceIndex(ABC, Generic[ViewT, QueryT]):
    """The views, and which choice took each instance last."""

    __slots__ = ("_num_choices", "last_chosen", "views")

    def __init__(self) -> None:
        self.views: dict[str, ViewT] = {}  # to be read only
        self.last_chosen: dict[str, int] = {}  # to be read only
        self._num_choices = 0

    def __len__(self) -> int:
        return len(self.views)

    @abstractmethod
    def put(self, view: ViewT) -> None:
        """Enter an instance, or what has changed of it."""

    def take(self, view: ViewT) -> None:
        """It was chosen, and this is its view now."""
        self._num_choices += 1
        self.last_chosen[view.instance_id] = self._num_choices
        self.put(view)

    def best(self, query: QueryT) -> Scored | None:
        """The winner."""
        best = self._best_of(query, 1)
        return best[0] if best else None

    def top(self, query: QueryT, count: int) -> list[str]:
        """The ids of the first `count`, or of fewer if there are no more."""
        return [scored.rank[3] for scored in self._best_of(query, count)]

    def select(self, query: QueryT) -> Selection:
        """The winner with the comparison, or of each instance why not."""
        best = self._best_of(query, SHOWN)
        return selection_of(best, {}, len(self) - len(best)) if best else self._compare_all(query)

    @abstractmethod
    def _best_of(self, query: QueryT, count: int) -> list[Scored]:
        """The first `count` of the full comparison, or fewer if there are no more."""

    @abstractmethod
    def _compare_all(self, query: QueryT) -> Selection: ...

    @staticmethod
    def _merge(
        failed: list[Scored], skip: set[str], next_best: Callable[[], Scored | None], count: int
    ) -> list[Scored]:
        """The first `count` of the `failed` instances, which are in order, and of those that `next_best` finds outside
        `skip`. Both arguments are used up."""
        best: list[Scored] = []
        while len(best) < count:
            found = next_best()
            if failed and (found is None or failed[0].rank < found.rank):
                best.append(failed.pop(0))
            elif found is not None:
                best.append(found)
                skip.add(found.rank[3])
            else:
                break
        return best

    def _turn(self, instance_id: str) -> int:
        return self.last_chosen.get(instance_id, 0)

    def _forget(self, instance_id: str) -> ViewT | None:
        self.last_chosen.pop(instance_id, None)
        return self.views.pop(instance_id, None)

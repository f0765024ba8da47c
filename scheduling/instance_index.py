"""Orders thousands of instances by load, so that a selection does not compare all of them.

Both indexes (`prefill_index`, `decode_index`) select exactly the instance that `scheduling.routing`'s full comparison
does, with a few look-ups:

    index.put(view)      a new instance, or a new state of a known one
    index.remove(id)     the instance is gone
    index.best(query)    the selected instance with its score; None if no instance can take the request
    index.select(query)  the same as a `Selection`: with the next candidates, or with the reasons why there is none
    index.take(view)     as `put`, for the instance that was selected: among equals, others are selected before it

In a query, instances in `avoid` are a last resort, those in `exclude` are no candidates, and `failures` counts recent
failures of a few instances. If KV may move only inside a node, the fingerprints have to contain the node.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set
from types import MappingProxyType
from typing import Generic, TypeVar

from tandem.scheduling.routing import DecodeView, PrefillView, Scored, Selection, selection_of

NO_INSTANCES: Set[str] = frozenset()
NO_FAILURES: Mapping[str, float] = MappingProxyType({})
NUM_EXPLAINED = 3  # candidates in a `Selection`

ViewT = TypeVar("ViewT", PrefillView, DecodeView)
QueryT = TypeVar("QueryT")


class InstanceIndex(ABC, Generic[ViewT, QueryT]):
    """Base of both indexes: the views, and the number of the selection that took each instance last."""

    __slots__ = ("_num_selections", "last_chosen", "views")

    def __init__(self) -> None:
        self.views: dict[str, ViewT] = {}  # to be read only
        self.last_chosen: dict[str, int] = {}  # to be read only
        self._num_selections = 0

    def __len__(self) -> int:
        return len(self.views)

    @abstractmethod
    def put(self, view: ViewT) -> None:
        """Add an instance, or replace its view."""

    def take(self, view: ViewT) -> None:
        """The instance was selected; `view` is its new view."""
        self._num_selections += 1
        self.last_chosen[view.instance_id] = self._num_selections
        self.put(view)

    def best(self, query: QueryT) -> Scored | None:
        """The selected instance."""
        best = self._best_of(query, 1)
        return best[0] if best else None

    def top(self, query: QueryT, count: int) -> list[str]:
        """Ids of the best `count` instances, or of all candidates if these are fewer."""
        return [scored.rank[3] for scored in self._best_of(query, count)]

    def select(self, query: QueryT) -> Selection:
        """The selected instance with the next candidates, or for each instance the reason why it is no candidate."""
        best = self._best_of(query, NUM_EXPLAINED)
        return selection_of(best, {}, len(self) - len(best)) if best else self._compare_all(query)

    @abstractmethod
    def _best_of(self, query: QueryT, count: int) -> list[Scored]:
        """The best `count` of the full comparison, or all candidates if these are fewer."""

    @abstractmethod
    def _compare_all(self, query: QueryT) -> Selection:
        """The full comparison of `scheduling.routing`, with a reason for each instance that is no candidate."""

    @staticmethod
    def _merge(
        failed: list[Scored], skip: set[str], next_best: Callable[[], Scored | None], count: int
    ) -> list[Scored]:
        """The best `count` of the `failed` instances, best first, and of those outside `skip`, of which `next_best`
        finds the best. Changes `failed` and `skip`."""
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
        """Number of the selection that took the instance last; 0: none did. The lowest is first among equals."""
        return self.last_chosen.get(instance_id, 0)

    def _forget(self, instance_id: str) -> ViewT | None:
        self.last_chosen.pop(instance_id, None)
        return self.views.pop(instance_id, None)

"""What a router knows of thousands of instances, kept in order, so that a choice need not compare them all.

Both books (`prefill_book`, `decode_book`) give exactly the winner of `scheduling.routing`'s full comparison, at the
price of a few look-ups:

    book.put(view)       an instance is there, or its load has changed
    book.remove(id)      it is gone
    book.pick(...)       the winner's id, None if no instance can take the request
    book.peek(...)       the winner with its score, which is not chosen by that
    book.choose(...)     the same as a `Choice`: with the comparison to the next few, or why there is none

A pick counts as chosen: among equals it is another's turn next. Instances in `avoid` are a last resort.
Where KV may move inside a node only, let the fingerprints name the node, too.
"""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from tandem.scheduling.routing import DecodeView, PrefillView

NOBODY: frozenset[str] = frozenset()
SHOWN = 3  # candidates of a choice that are written down

ViewT = TypeVar("ViewT", PrefillView, DecodeView)


class LoadBook(ABC, Generic[ViewT]):
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

    def _turn(self, instance_id: str) -> int:
        return self.last_chosen.get(instance_id, 0)

    def _take(self, instance_id: str) -> str:
        """It is chosen."""
        self._num_choices += 1
        self.last_chosen[instance_id] = self._num_choices
        self.put(self.views[instance_id])
        return instance_id

    def _forget(self, instance_id: str) -> ViewT | None:
        self.last_chosen.pop(instance_id, None)
        return self.views.pop(instance_id, None)

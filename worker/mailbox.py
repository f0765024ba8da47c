"""Values posted to a loop thread from any other thread."""

import queue
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """First in, first out; one reader."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Item] = queue.SimpleQueue()

    def post(self, item: Item) -> None:
        """Never blocks; safe from any thread."""
        self._queue.put(item)

    def take_all(self, wait_s: float = 0.0) -> list[Item]:
        """Everything posted so far; if that is nothing, wait up to `wait_s` for the first."""
        items: list[Item] = []
        try:
            items.append(self._queue.get(timeout=wait_s) if wait_s > 0 else self._queue.get_nowait())
            while True:
                items.append(self._queue.get_nowait())
        except queue.Empty:
            return items

"""Changes of a cluster, one after the other."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from tandem.core.errors import UnavailableError

Result = TypeVar("Result")


class ChangeQueue:
    """Each change is a task of its own: it goes on when its caller goes away. `close` ends those in progress."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    async def run(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """`work` when its turn comes. Raises UnavailableError after `close`, and what `work` raises."""
        if self._is_closed:
            raise _stopping()

        async def take_turn() -> Result:
            async with self._turn:
                return await work()

        change = asyncio.create_task(take_turn())
        self._changes.add(change)
        change.add_done_callback(self._changes.discard)
        change.add_done_callback(lambda task: task.cancelled() or task.exception())  # its caller may be gone
        try:
            return await asyncio.shield(change)
        except asyncio.CancelledError:
            if self._is_closed and change.cancelled():
                raise _stopping() from None
            raise

    async def close(self) -> None:
        """No change begins any more, and none is in progress afterwards."""
        self._is_closed = True
        for change in self._changes:
            change.cancel()
        await asyncio.gather(*self._changes, return_exceptions=True)


def _stopping() -> UnavailableError:
    return UnavailableError("the cluster is being stopped")

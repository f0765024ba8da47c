"""Lines for people about what happens in a cluster."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

_MAX_UNREAD = 1000
_MAX_PAST = 200


class LineFeed:
    """`show` gets every line at once. Each follower gets as many of the last lines as it asks for, and those from its
    first look on; one that does not read misses lines."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._past: deque[str] = deque(maxlen=_MAX_PAST)
        self._followers: list[asyncio.Queue[str]] = []

    def say(self, line: str) -> None:
        self._show(line)
        self._past.append(line)
        for unread in self._followers:
            if not unread.full():
                unread.put_nowait(line)

    def follow(self, num_past: int) -> AsyncIterator[str]:
        """Until the caller has enough; no line after this call is missed."""
        unread: asyncio.Queue[str] = asyncio.Queue(_MAX_UNREAD)
        for line in [*self._past][len(self._past) - min(num_past, len(self._past)) :]:
            unread.put_nowait(line)
        self._followers.append(unread)
        return self._read(unread)

    async def _read(self, unread: "asyncio.Queue[str]") -> AsyncIterator[str]:
        try:
            while True:
                yield await unread.get()
        finally:
            self._followers.remove(unread)

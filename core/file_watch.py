"""Detects that files have been replaced or changed."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

_LOOK_S = 2.0

_State = tuple[int, int, int, int] | None


class FileWatch:
    """Watches files that may be replaced while they are in use, such as certificates and keys."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._seen = self._look()

    def has_changed(self) -> bool:
        """Whether a file has changed since the last call, or since the constructor; also if it was removed or added."""
        before, self._seen = self._seen, self._look()
        return before != self._seen

    async def wait_for_change(self) -> None:
        """Returns within seconds of the next change."""
        while not await asyncio.to_thread(self.has_changed):  # noqa: ASYNC110 - files tell no event
            await asyncio.sleep(_LOOK_S)

    def _look(self) -> tuple[_State, ...]:
        return tuple(map(_state_of, self._paths))


def _state_of(path: Path) -> _State:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

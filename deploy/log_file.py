"""Reads the log of a process, from its end on."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.core.errors import NotFoundError

ReadLog = Callable[[str, int, bool], AsyncIterator[Sequence[str]]]
"""The lines of a process's log: takes its name, how many of the last lines, and whether later ones follow."""

_MOST_BYTES = 1 << 20  # of one part
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class LogPart:
    """Lines without their ends. The next part begins at `position`."""

    lines: tuple[str, ...]
    position: int


def read_log(folder: Path, process: str, num_past: int, position: int | None) -> LogPart:
    """What is in the log after `position`; without one, the last `num_past` lines. A log that is shorter than
    `position` was moved away because it was long, and is read from its beginning. Raises NotFoundError."""
    paths = {path.stem: path for path in sorted(folder.glob("*.log"))}
    if process not in paths:
        raise NotFoundError(f"there is no log of '{process}' in {folder}; there is {', '.join(paths) or 'none'}")
    with paths[process].open("rb") as log:
        size = log.seek(0, 2)
        is_first = position is None
        if position is None:
            position = max(0, size - _MOST_BYTES)
        elif position > size:
            position = 0
        log.seek(position)
        text = log.read(_MOST_BYTES)
    end = text.rfind(b"\n") + 1
    whole = text if is_first or (not end and len(text) == _MOST_BYTES) else text[:end]
    lines = whole.decode(errors="replace").splitlines()
    if is_first:
        lines = list(deque(lines, maxlen=num_past))
    return LogPart(tuple(lines), position + len(whole))


def folder_logs(folder: Path) -> ReadLog:
    """Of processes of this host."""

    def read(process: str, num_past: int, follow: bool) -> AsyncIterator[tuple[str, ...]]:
        return follow_log(
            lambda position: asyncio.to_thread(read_log, folder, process, num_past, position), follow=follow
        )

    return read


async def follow_log(
    read: Callable[[int | None], Awaitable[LogPart]], *, follow: bool
) -> AsyncIterator[tuple[str, ...]]:
    """The parts that `read` gives, each from the position of the last one on; with `follow` for ever."""
    position: int | None = None
    while True:
        part = await read(position)
        position = part.position
        if part.lines:
            yield part.lines
            continue
        if not follow:
            return
        await asyncio.sleep(_LOOK_S)

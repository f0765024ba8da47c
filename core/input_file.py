"""Files that users name: configurations, secrets, certificates, tables, checkpoints.

A path may be that of anything: a device that never ends, a pipe that nobody writes to. So every reader has a bound, and
nobody waits for a writer.
"""

import errno
import os
from pathlib import Path
from typing import BinaryIO

_PART_BYTES = 1 << 20


def open_input(path: Path) -> BinaryIO:
    """For reading. A pipe without a writer is empty. Raises OSError."""
    return open(path, "rb", opener=_open_without_wait)


def read_input(path: Path, max_bytes: int) -> bytes:
    """The whole content. Raises OSError, also for more than `max_bytes`."""
    parts, num_bytes = [], 0
    with open_input(path) as file:
        while part := file.read(min(_PART_BYTES, max_bytes + 1 - num_bytes)):
            parts.append(part)
            num_bytes += len(part)
    if num_bytes > max_bytes:
        limit = f"{max_bytes >> 20} MiB" if max_bytes >= 1 << 20 else f"{max_bytes >> 10} KiB"
        raise OSError(errno.EFBIG, f"larger than {limit}", str(path))
    return b"".join(parts)


def _open_without_wait(path: str, flags: int) -> int:
    """To open a named pipe waits for a writer, and not to wait is a flag that later reads keep."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor

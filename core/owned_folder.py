"""Temporary folders that are removed later if their process is killed.

The process that made a folder holds a lock on it (flock), which the kernel releases however the process ends. The next
process that makes a folder of the same kind removes the folders without a lock.
"""

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

_YOUNG_S = 60.0  # younger folders are not removed: they may not be locked yet


class OwnedFolder:
    """`path` is readable by this user only, and stays until `remove`, or for some time after the end of the process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def make(cls, kind: str) -> "OwnedFolder":
        """`tandem-KIND-...`, where the system keeps temporary files. Raises OSError."""
        _remove_left(kind)
        path = Path(tempfile.mkdtemp(prefix=f"tandem-{kind}-"))
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return cls(path, descriptor)

    def remove(self) -> None:
        """Remove the folder; call this once."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


def _remove_left(kind: str) -> None:
    """Remove the folders of this user's processes that have ended."""
    for path in Path(tempfile.gettempdir()).glob(f"tandem-{kind}-*"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, or just removed
        try:
            state = os.fstat(descriptor)
            if state.st_uid == os.getuid() and time.time() - state.st_mtime > _YOUNG_S:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # its process runs
        finally:
            os.close(descriptor)

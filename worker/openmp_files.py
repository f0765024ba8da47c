"""Removes files that torch's OpenMP leaves behind when a process is killed."""

import os
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")


def remove_openmp_files(folder: Path = _SHARED_MEMORY) -> None:
    """Remove the files `__KMP_REGISTERED_LIB_<pid>_<uid>` of this user's processes that have ended. A process of
    another container that shares the folder may lose its file, too, and works without it: OpenMP uses the file only to
    detect a second OpenMP in its process."""
    for path in folder.glob(f"__KMP_REGISTERED_LIB_*_{os.getuid()}"):
        pid = path.name.split("_")[-2]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            path.unlink(missing_ok=True)

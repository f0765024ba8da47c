"""What torch's OpenMP leaves of killed processes."""

import os
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")


def remove_openmp_files(folder: Path = _SHARED_MEMORY) -> None:
    """OpenMP has a file in shared memory for each process, `__KMP_REGISTERED_LIB_<pid>_<uid>`, which a process that is
    killed leaves there. Remove those of this user's processes that have ended. A process of another container that
    shares the folder works without its file: it only serves to find a second OpenMP in the process."""
    for path in folder.glob(f"__KMP_REGISTERED_LIB_*_{os.getuid()}"):
        pid = path.name.split("_")[-2]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            path.unlink(missing_ok=True)

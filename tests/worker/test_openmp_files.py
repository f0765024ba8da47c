import os
import subprocess
import sys
from pathlib import Path

from tandem.worker.openmp_files import remove_openmp_files


def test_files_of_ended_processes_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(30)
    uid = os.getuid()
    gone = tmp_path / f"__KMP_REGISTERED_LIB_{ended.pid}_{uid}"
    kept = [
        tmp_path / f"__KMP_REGISTERED_LIB_{os.getpid()}_{uid}",
        tmp_path / f"__KMP_REGISTERED_LIB_{ended.pid}_{uid + 1}",
        tmp_path / f"__KMP_REGISTERED_LIB__{uid}",
        tmp_path / "other",
    ]
    for path in (gone, *kept):
        path.touch()
    remove_openmp_files(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)

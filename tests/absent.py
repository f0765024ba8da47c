"""A Python in which some libraries are not installed."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_HOOK = """\
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Absent())
"""


def run_without(libraries: str, statements: str, folder: Path = _ROOT) -> subprocess.CompletedProcess[str]:
    """Run `statements` in `folder`; an import of any of `libraries` (their names, with spaces between) fails."""
    return subprocess.run(
        [sys.executable, "-c", _HOOK.format(absent=libraries.split()) + statements],
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

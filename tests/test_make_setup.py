"""`make setup` with a pip that warns: pip's words appear only when it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_WARNING = "WARNING: Location 'https://none.invalid/wheels' is ignored"


def setup(folder: Path, status: int) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "{_WARNING}" >&2\nexit {status}\n')
    python.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", "setup", f"PYTHON={sys.executable}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_it_is_quiet_unless_it_fails(tmp_path: Path) -> None:
    (tmp_path / "fine").mkdir()
    fine = setup(tmp_path / "fine", 0)
    assert fine.returncode == 0
    assert fine.stdout.splitlines() == ["making .venv; build/setup.log says how far it is"]
    assert fine.stderr == ""
    assert _WARNING in (tmp_path / "fine" / "build" / "setup.log").read_text()

    (tmp_path / "failing").mkdir()
    failing = setup(tmp_path / "failing", 1)
    assert failing.returncode != 0
    assert _WARNING in failing.stderr
    assert not (tmp_path / "failing" / ".venv" / ".tandem-setup").exists()

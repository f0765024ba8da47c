"""Checkpoints damaged in every field: loaded or refused with one sentence, without a crash or a giant allocation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


def _run(folder: Path, step: int, first: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.engine.damaged_checkpoints", str(folder), str(step), str(first)]
    result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")] or lines[-1:]
    assert result.returncode == 0, (wrong, result.stderr[-2000:])
    counts: dict[str, int] = json.loads(lines[-1])
    return counts


def test_a_sample_of_damaged_checkpoints(tmp_path: Path) -> None:
    counts = _run(tmp_path, step=61, first=7)
    assert counts["refused"] > 80
    assert counts["loaded"] > 10  # damages that do not matter, which shows that the others do


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_damaged_checkpoints(tmp_path: Path) -> None:
    counts = _run(tmp_path, step=1, first=0)
    assert counts["refused"] > 6000

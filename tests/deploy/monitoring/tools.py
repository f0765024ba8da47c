"""Programs of Prometheus' package, which `make build/tools/promtool` fetches."""

import shutil
from pathlib import Path

import pytest

_FETCHED = Path(__file__).parents[3] / "build" / "tools"


def require(name: str) -> str:
    """Path of promtool or prometheus; skips the test without it."""
    path = shutil.which(name, path=str(_FETCHED)) or shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing: make build/tools/promtool")
    return path

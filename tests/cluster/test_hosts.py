"""A cluster on two hosts. The tests themselves are in `two_hosts.py` and `ray_hosts.py`."""

from pathlib import Path

import pytest

from tests.cluster.namespaces import run_inside

FOLDER = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file", ["two_hosts.py", "ray_hosts.py"])
def test_two_hosts(file: str) -> None:
    run_inside(FOLDER / file)

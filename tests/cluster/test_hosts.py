"""A cluster on several hosts. The tests themselves are in the files named below."""

from pathlib import Path

import pytest

from tests.cluster.namespaces import run_inside

FOLDER = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("file", "hosts"),
    [
        ("two_hosts.py", "ab"),
        ("ray_hosts.py", "ab"),
        ("rank_hosts.py", "ab"),
        ("rank_faults.py", "ab"),
        ("cut_links.py", "rab"),
    ],
)
def test_hosts(file: str, hosts: str) -> None:
    run_inside(FOLDER / file, hosts)

"""Two hosts: two network namespaces, joined by a veth pair. The tests themselves are in `two_hosts.py`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str, str]]:
    """Names of both namespaces, and of the second one's end of the link. They and all in them are gone afterwards."""
    a, b = (f"tandem-{os.getpid()}{host}" for host in "ab")
    link_a, link_b = (f"tdm{os.getpid()}{host}" for host in "ab")  # at most 15 characters
    try:
        ip("netns", "add", a)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not permit network namespaces")
    try:
        ip("netns", "add", b)
        ip("link", "add", link_a, "netns", a, "type", "veth", "peer", "name", link_b, "netns", b)
        for namespace, link, address in ((a, link_a, "10.77.0.1/24"), (b, link_b, "10.77.0.2/24")):
            ip("-n", namespace, "addr", "add", address, "dev", link)
            ip("-n", namespace, "link", "set", "lo", "up")
            ip("-n", namespace, "link", "set", link, "up")
        yield a, b, link_b
    finally:
        for namespace in (a, b):
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hosts(hosts: tuple[str, str, str]) -> None:
    a, b, link_b = hosts
    inside = subprocess.run(
        ["ip", "netns", "exec", a, sys.executable, "-m", "pytest", "-q", "--timeout=600", str(FOLDER / "two_hosts.py")],
        env=os.environ | {"HOST_B": b, "LINK_B": link_b},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        timeout=890,
        check=False,
    )
    assert inside.returncode == 0, inside.stdout[-20_000:] + inside.stderr[-4000:]

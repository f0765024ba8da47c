"""Two hosts: two network namespaces, joined by a veth pair. Tests run themselves again inside the first one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str, str]]:
    """Names of both namespaces, and of the second one's end of the link. They and all in them are gone afterwards."""
    a, b = (f"tandem-{os.getpid()}{host}" for host in "ab")
    link_a, link_b = (f"tdm{os.getpid()}{host}" for host in "ab")  # at most 15 characters
    try:
        _ip("netns", "add", a)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not permit network namespaces")
    try:
        _ip("netns", "add", b)
        _ip("link", "add", link_a, "netns", a, "type", "veth", "peer", "name", link_b, "netns", b)
        for namespace, link, address in ((a, link_a, "10.77.0.1/24"), (b, link_b, "10.77.0.2/24")):
            _ip("-n", namespace, "addr", "add", address, "dev", link)
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "link", "set", link, "up")
        yield a, b, link_b
    finally:
        for namespace in (a, b):
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


def run_inside(file: Path) -> None:
    """The tests of `file` in the first host; the variables HOST_B and LINK_B name the second one and its link."""
    with two_hosts() as (a, b, link_b):
        inside = subprocess.run(
            ["ip", "netns", "exec", a, sys.executable, "-m", "pytest", "-q", "--timeout=800", str(file)],
            env=os.environ | {"HOST_B": b, "LINK_B": link_b},
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=1190,
            check=False,
        )
    assert inside.returncode == 0, inside.stdout[-20_000:] + inside.stderr[-4000:]

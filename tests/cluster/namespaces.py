"""Hosts: network namespaces, each two joined by a veth pair. Tests run themselves again inside the first one.

    link k, of the k-th two hosts: 10.77.k.i -- 10.77.k.j; its ends are called `to-j` and `to-i`
    host i, reachable over all of its links: 10.78.0.i

i and j are the places of the two hosts in their order, from 1 on.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_NOBODY = "02:00:00:00:00:ff"  # no interface has this address


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Hosts:
    """Their names are letters; `namespaces` has the name of each one's network namespace."""

    def __init__(self, namespaces: dict[str, str]) -> None:
        self.namespaces = namespaces
        self._places = {host: place for place, host in enumerate(namespaces, start=1)}
        self._links = list(itertools.combinations(namespaces, 2))
        self._slow: set[tuple[str, str]] = set()  # ends of links

    @classmethod
    def of_environment(cls) -> "Hosts":
        """Those that `run_inside` has made for this process."""
        return cls(dict(pair.split("=") for pair in os.environ["HOSTS"].split(",")))

    def make(self) -> None:
        for host, namespace in self.namespaces.items():
            _run("ip", "netns", "add", namespace)
            self._ip(host, "link", "set", "lo", "up")
            self._ip(host, "addr", "add", f"{self.address(host)}/32", "dev", "lo")
        for a, b in self._links:
            ends = (f"to-{b}", "netns", self.namespaces[a], "type", "veth"), (f"to-{a}", "netns", self.namespaces[b])
            _run("ip", "link", "add", *ends[0], "peer", "name", *ends[1])
            for here, there in ((a, b), (b, a)):
                self._ip(here, "addr", "add", f"{self.link_address(here, there)}/24", "dev", f"to-{there}")
            self.mend(a, b)

    def address(self, host: str) -> str:
        return f"10.78.0.{self._places[host]}"

    def link_address(self, host: str, peer: str) -> str:
        """Of the host's end of its link to the peer."""
        number = next(number for number, link in enumerate(self._links) if {host, peer} == set(link))
        return f"10.77.{number}.{self._places[host]}"

    def inside(self, host: str) -> list[str]:
        """The beginning of a command that runs there."""
        return ["ip", "netns", "exec", self.namespaces[host]]

    # --- faults ------------------------------------------------------------------------------------------------------

    def cut(self, a: str, b: str) -> None:
        """Take the link down: both sides can know."""
        for here, there in ((a, b), (b, a)):
            self._ip(here, "link", "set", f"to-{there}", "down")

    def lose(self, a: str, b: str) -> None:
        """All packets between the two vanish from now on, and nobody is told."""
        for here, there in ((a, b), (b, a)):
            wrong = ("lladdr", _NOBODY, "nud", "permanent", "dev", f"to-{there}")
            self._ip(here, "neigh", "replace", self.link_address(there, here), *wrong)

    def slow(self, a: str, b: str, megabits_per_s: int) -> None:
        """In each direction."""
        for here, there in ((a, b), (b, a)):
            rate = ("rate", f"{megabits_per_s}mbit", "burst", "64kb", "latency", "50ms")
            self._tc(here, "replace", "dev", f"to-{there}", "root", "tbf", *rate)
            self._slow.add((here, there))

    def mend(self, a: str, b: str) -> None:
        """The link is as new."""
        ends = ((a, b), (b, a))
        for here, there in ends:
            self._ip(here, "link", "set", f"to-{there}", "up")
            self._ip(here, "neigh", "flush", "dev", f"to-{there}", "nud", "all")
            if (here, there) in self._slow:
                self._slow.discard((here, there))
                self._tc(here, "del", "dev", f"to-{there}", "root")
        for here, there in ends:
            way = ("via", self.link_address(there, here), "src", self.address(here))
            self._ip(here, "route", "replace", f"{self.address(there)}/32", *way)

    def sent_bytes(self, host: str, peer: str) -> int:
        """By that host over its link to the peer, so far."""
        (link,) = json.loads(self._ip(host, "-s", "-j", "link", "show", "dev", f"to-{peer}"))
        return int(link["stats64"]["tx"]["bytes"])

    def _ip(self, host: str, *arguments: str) -> str:
        return _run("ip", "-n", self.namespaces[host], *arguments)

    def _tc(self, host: str, action: str, *arguments: str) -> str:
        return _run("tc", "-n", self.namespaces[host], "qdisc", action, *arguments)


@contextmanager
def running_hosts(names: str) -> Iterator[Hosts]:
    """One host for each letter. They and all in them are gone afterwards."""
    hosts = Hosts({name: f"tandem-{os.getpid()}{name}" for name in names})
    try:
        _run("unshare", "--net", "true")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not permit network namespaces")
    try:
        hosts.make()
        yield hosts
    finally:
        for namespace in hosts.namespaces.values():
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


def run_inside(file: Path, names: str = "ab") -> None:
    """The tests of `file` in the first host; there `Hosts.of_environment` has all of them."""
    with running_hosts(names) as hosts:
        inside = subprocess.run(
            [*hosts.inside(names[0]), sys.executable, "-m", "pytest", "-q", "--timeout=800", str(file)],
            env=os.environ | {"HOSTS": ",".join(f"{host}={name}" for host, name in hosts.namespaces.items())},
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=1190,
            check=False,
        )
    assert inside.returncode == 0, inside.stdout[-20_000:] + inside.stderr[-4000:]

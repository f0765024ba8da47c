"""Addresses as users write them."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from tandem.core.address import split_address
from tandem.core.config import WorkerConfig
from tandem.core.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("localhost:0", ("localhost", 0)),
        ("worker-3.workers_a.example:65535", ("worker-3.workers_a.example", 65535)),
        ("[::1]:80", ("::1", 80)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
        ("bücher.example:80", ("bücher.example", 80)),
    ],
)
def test_an_address(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    ("address", "mistake"),
    [
        ("", ""),
        ("localhost", ""),
        ("[::1]", ""),
        (":80", "; 127.0.0.1:80 is of this machine alone, 0.0.0.0:80 of all its interfaces"),
        ("a b:80", "; 'a b' is no name of a host"),
        (" localhost:80", "; ' localhost' is no name of a host"),
        ("localhost:80 ", "; '80 ' is no port"),
        ("localhost:", "; '' is no port"),
        ("localhost:http", "; 'http' is no port"),
        ("localhost:-1", "; '-1' is no port"),
        ("localhost:\u0663", "; '\u0663' is no port"),
        ("localhost:65536", "; a port is at most 65535"),
        ("localhost:99999999999", "; a port is at most 65535"),
        ("::1:80", "; write [::1]:80"),
        ("a:b:80", "; it has one colon, or an IPv6 address in brackets"),
        ("[a]:80", "; [a] is no IPv6 address"),
        ("[127.0.0.1]:80", "; [127.0.0.1] is no IPv6 address"),
        ("[]:80", "; [] is no IPv6 address"),
        ("http://localhost:80", "; leave out what is before the host"),
        ("unix:/run/tandem:80", "; Unix sockets are not supported"),
        ("/run/tandem.sock", "; Unix sockets are not supported"),
        ("user@host:80", "; 'user@host' is no name of a host"),
    ],
)
def test_what_is_no_address(address: str, mistake: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_address(address)
    assert caught.value.message == f"'{address}' is not an address of the form host:port{mistake}"


@pytest.mark.parametrize("host", ["host-1", "10.0.0.1", "fd00::1"])
def test_a_host(host: str) -> None:
    assert WorkerConfig(model=Path("/m"), advertise=host).advertise == host


@pytest.mark.parametrize("host", ["", "host:80", "[fd00::1]", "a b", "10.0.0.1:0"])
def test_what_is_no_host(host: str) -> None:
    with pytest.raises(ValidationError, match="a name or an IP address, without a port"):
        WorkerConfig(model=Path("/m"), advertise=host)

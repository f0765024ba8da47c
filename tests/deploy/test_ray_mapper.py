"""Work spread over Ray, a real one."""

import operator
import os
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import psutil
import pytest

from core.config import split_address
from core.errors import ConfigError, UnavailableError
from deploy.ray_mapper import ray_mapper


@pytest.fixture
def environment() -> Iterator[None]:
    """A Ray of our own sets variables for its processes."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("environment")
def test_answers_come_in_order_and_errors_as_they_are() -> None:
    others = set(psutil.Process().children(recursive=True))
    with ray_mapper("local") as mapper:
        assert mapper.workers >= 1
        assert mapper(partial(operator.mul, 3), range(100)) == [3 * n for n in range(100)]
        assert mapper(_here, [0]) == [os.getpid()], "a single item takes no trip"
        with pytest.raises(ConfigError, match=r"'nowhere' is not an address"):
            mapper(split_address, ["a:1", "nowhere"])
        started = set(psutil.Process().children(recursive=True)) - others
        began_s = time.monotonic()
        with pytest.raises(TypeError):
            mapper(_sleep, ["long", 60.0])
        assert time.monotonic() - began_s < 20.0, "nobody waits for the other one"
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == [], "which has ended with the rest"


def _here(_: int) -> int:
    return os.getpid()


def _sleep(time_s: Any) -> None:
    time.sleep(time_s)


def test_where_no_ray_is_it_says_so_at_once() -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=rf"no Ray answers at {address} \(Connection refused\); start one"):
            ray_mapper(address).__enter__()
    with pytest.raises(ConfigError, match=r"--ray nearby: give host:port of a Ray cluster's head, auto or local"):
        ray_mapper("nearby").__enter__()

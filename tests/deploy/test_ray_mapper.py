"""Work spread over Ray, a real one."""

import operator
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from tandem.core.address import split_address
from tandem.core.errors import ConfigError, UnavailableError
from tandem.deploy.ray_mapper import ray_mapper

_ROOT = Path(__file__).parents[2]


@pytest.mark.unmeasured
@pytest.mark.timeout(120)
def test_answers_come_in_order_and_errors_as_they_are() -> None:
    """In a process of its own: Ray reads the secret of its cluster once in a process, and other tests have theirs."""
    check = "import tests.deploy.test_ray_mapper as test; test.check_local_ray()"
    done = subprocess.run([sys.executable, "-c", check], cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check_local_ray() -> None:
    with ray_mapper("local") as mapper:
        assert mapper.workers >= 1
        assert mapper(partial(operator.mul, 3), range(100)) == [3 * n for n in range(100)]
        assert mapper(lambda _: os.getpid(), [0]) == [os.getpid()], "a single item takes no trip"
        with pytest.raises(ConfigError, match=r"'nowhere' is not an address"):
            mapper(split_address, ["a:1", "nowhere"])
        started = psutil.Process().children(recursive=True)
        began_s = time.monotonic()
        with pytest.raises(TypeError):
            mapper(time.sleep, ["long", 60.0])
        assert time.monotonic() - began_s < 20.0, "nobody waits for the other one"
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == [], "which has ended with the rest"


def test_where_no_ray_is_it_says_so_at_once() -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=rf"no Ray answers at {address} \(Connection refused\); start one"):
            ray_mapper(address).__enter__()
    with pytest.raises(ConfigError, match=r"--ray nearby: give host:port of a Ray cluster's head, auto or local"):
        ray_mapper("nearby").__enter__()

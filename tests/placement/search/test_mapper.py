"""Worker processes: Ctrl-C, a killed worker, a killed parent."""

import multiprocessing
import multiprocessing.process
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tandem.core.errors import UnavailableError
from tandem.placement.search.mapper import local_mapper


def _blocks_ctrl_c(_: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def _interrupted(others: list[multiprocessing.process.BaseProcess]) -> None:
    with local_mapper(2) as mapper:
        assert mapper(_blocks_ctrl_c, [0, 1]) == [True, True]
        assert not _blocks_ctrl_c(0), "here it comes through again"
        assert len(multiprocessing.active_children()) > len(others)
        raise KeyboardInterrupt


def test_ctrl_c_reaches_only_the_caller_and_ends_the_workers() -> None:
    others = list(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt):
        _interrupted(others)
    until_s = time.monotonic() + 10.0
    while multiprocessing.active_children() != others:
        assert time.monotonic() < until_s, "they are still there"
        time.sleep(0.02)


def _die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error() -> None:
    with local_mapper(2) as mapper, pytest.raises(UnavailableError, match="was killed"):
        mapper(_die, [0, 1])


def test_workers_end_with_a_killed_parent() -> None:
    script = (
        "from tandem.placement.search.mapper import local_mapper\n"
        "if __name__ == '__main__':\n"
        "    with local_mapper(2) as mapper:\n"
        "        print(*mapper(abs, [1, 2]), flush=True)\n"
        "        input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"1 2\n"
        helpers = psutil.Process(parent.pid).children(recursive=True)
        assert helpers
        parent.kill()
    _, alive = psutil.wait_procs(helpers, timeout=10)
    assert not alive

"""Worker processes: Ctrl-C and SIGTERM, a killed worker, a killed parent."""

import multiprocessing
import multiprocessing.process
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tandem.core.errors import ConfigError, UnavailableError
from tandem.placement.search.mapper import local_mapper

_ROOT = Path(__file__).resolve().parents[3]


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
    assert multiprocessing.active_children() == others


def _die(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 2:
        raise ConfigError("two")
    return -item


def test_results_are_in_order_and_an_error_is_that_of_the_function() -> None:
    with local_mapper(2) as mapper:
        with pytest.raises(UnavailableError, match="was killed"):
            mapper(_die, [0, 3, 1, 1])
        with pytest.raises(ConfigError, match="two"):
            mapper(_die, [0, 1, 1, 2, 0])
        assert mapper(_die, [7]) == [-7]
        assert mapper(_die, [5, 4, 1, 0, 9]) == [-5, -4, -1, 0, -9]
        assert mapper(abs, [-1, -2]) == [1, 2]


def _started(script: str) -> "subprocess.Popen[bytes]":
    """A process that has printed a line."""
    lines = "from tandem.placement.search.mapper import local_mapper\n" + script
    process = subprocess.Popen(
        [sys.executable, "-c", lines],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"1 2\n"
    return process


def test_workers_end_with_a_killed_parent() -> None:
    script = (
        "if __name__ == '__main__':\n"
        "    with local_mapper(2) as mapper:\n"
        "        print(*mapper(abs, [1, 2]), flush=True)\n"
        "        input()\n"
    )
    with _started(script) as parent:
        helpers = psutil.Process(parent.pid).children(recursive=True)
        assert helpers
        parent.kill()
    _, alive = psutil.wait_procs(helpers, timeout=10)
    assert not alive


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_call_with_much_work_left(number: signal.Signals) -> None:
    """As `tandem plan` is ended. More waits than a pipe holds: that once kept the interpreter from ending."""
    script = (
        "import time\n"
        "from tandem.cli.signals import signals_interrupt\n"
        "if __name__ == '__main__':\n"
        "    with signals_interrupt(), local_mapper(2) as mapper:\n"
        "        print(*mapper(abs, [1, 2]), flush=True)\n"
        "        mapper(time.sleep, [60.0] * 20 + [b'1' * 1_000_000] * 20)\n"
    )
    with _started(script) as parent:
        helpers = psutil.Process(parent.pid).children(recursive=True)
        time.sleep(0.2)
        parent.send_signal(number)
        _, errors = parent.communicate(timeout=60)
    assert b"KeyboardInterrupt" in errors
    assert b"Exception in thread" not in errors
    _, alive = psutil.wait_procs(helpers, timeout=10)
    assert not alive

"""The processes that simulate: what Ctrl-C does to them."""

import multiprocessing
import multiprocessing.process
import signal
import time

import pytest

from placement.search.parallel import local_mapper


def _blocks_ctrl_c(_: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def _interrupted(others: list[multiprocessing.process.BaseProcess]) -> None:
    with local_mapper(2) as mapper:
        assert mapper(_blocks_ctrl_c, [0, 1]) == [True, True]
        assert not _blocks_ctrl_c(0), "here it comes through again"
        assert len(multiprocessing.active_children()) > len(others)
        raise KeyboardInterrupt


def test_ctrl_c_is_for_the_caller_alone_and_ends_them() -> None:
    others = list(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt):
        _interrupted(others)
    until_s = time.monotonic() + 10.0
    while multiprocessing.active_children() != others:
        assert time.monotonic() < until_s, "they are still there"
        time.sleep(0.02)

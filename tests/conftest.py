"""Marks of all tests, their order, and how much of them coverage sees."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from coverage import Coverage
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # both halves of `make test` share two cores; threads of torch would spin
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell makes its background processes ignore
settings.register_profile("tandem", deadline=None)  # a busy machine is no failure
settings.load_profile("tandem")

REAL_PROCESSES = {"chaos", "cli", "cluster", "deploy"}  # folders whose tests start whole clusters
MEASURED_S = 1.0  # of processor time; coverage makes Python code take several times as long
PROCESS_CONFIG = "COVERAGE_PROCESS_CONFIG"  # the variable with which coverage measures a process that is started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole clusters last: `make test` runs some folders beside the other tests, and then the machine is theirs."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(here).parts[0] in REAL_PROCESSES)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Coverage sees the beginning of each test, after which lines are rarely new, or all of one that is marked
    `measured`. It does not see the processes of a test that is marked `unmeasured`, those of its fixtures included."""
    with contextlib.ExitStack() as stack:
        if item.get_closest_marker("unmeasured"):
            stack.enter_context(_processes_unmeasured())
        if not item.get_closest_marker("measured"):
            stack.enter_context(_measured_at_first())
        return (yield)


@contextlib.contextmanager
def _processes_unmeasured() -> Iterator[None]:
    process_config = os.environ.pop(PROCESS_CONFIG, None)
    try:
        yield
    finally:
        if process_config is not None:
            os.environ[PROCESS_CONFIG] = process_config


@contextlib.contextmanager
def _measured_at_first() -> Iterator[None]:
    """Until this process has computed for MEASURED_S."""
    coverage, has_ended, began_s = Coverage.current(), threading.Event(), time.process_time()
    if coverage is None:
        yield
        return

    def stop_in_time() -> None:
        while (left_s := began_s + MEASURED_S - time.process_time()) > 0:
            if has_ended.wait(left_s):
                return
        coverage.stop()

    watch = threading.Thread(target=stop_in_time, name="coverage of a test", daemon=True)
    watch.start()
    try:
        yield
    finally:
        has_ended.set()
        watch.join()
        if Coverage.current() is None:
            coverage._warn_preimported_source = False  # its look at all modules fails at torch's
            coverage.start()

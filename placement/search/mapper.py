"""Parallel execution on the cores of this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from typing import Protocol, TypeVar

from tandem.core.errors import UnavailableError

T = TypeVar("T")
R = TypeVar("R")


class Mapper(Protocol):
    """Calls a picklable function on every item, several at a time, and returns the results in the items' order."""

    @property
    def workers(self) -> int:
        """How many items are processed at the same time."""
        ...

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]: ...


class SerialMapper:
    """Runs in this process, one item after the other."""

    workers = 1

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        return [function(item) for item in items]


class ProcessMapper:
    """Runs in processes of this machine; a single item runs in the calling process.

    Raises UnavailableError when a process is killed.
    """

    def __init__(self, pool: ProcessPoolExecutor, workers: int) -> None:
        self._pool = pool
        self.workers = workers

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        if len(items) < 2:
            return [function(item) for item in items]
        try:
            with _sigint_blocked():  # also in the processes that this call starts: they print no tracebacks
                results = self._pool.map(function, items)
            return list(results)
        except BrokenProcessPool as error:
            raise UnavailableError(
                "A simulation process was killed, probably because memory ran out; try --workers 1."
            ) from error


@contextmanager
def local_mapper(workers: int = 0) -> Iterator[Mapper]:
    """`workers` processes, 0 for one per core. They start at the first use and end with the context, on Ctrl-C too.

    The processes are spawned, not forked: the caller may have threads.
    """
    count = workers or available_cores()
    if count == 1:
        yield SerialMapper()
        return
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent)
    try:
        yield ProcessMapper(pool, count)
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()  # the results are not needed
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Delays a Ctrl-C until the end of the context. Processes started in the context block Ctrl-C for ever."""
    resource_tracker.ensure_running()  # its start would unblock signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """Ends this process when its parent is killed; otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker process has a parent"

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))

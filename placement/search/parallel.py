"""Work spread over the cores of this machine, or over whatever the caller has."""

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
    """Calls a picklable function on every item, several at a time, and returns the answers in the items' order."""

    @property
    def workers(self) -> int:
        """How many items are worked on at the same time."""
        ...

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]: ...


class Serial:
    """One after the other, here."""

    workers = 1

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        return [function(item) for item in items]


class Processes:
    """Processes of this machine. A single item is worked on here, which costs no trip.

    Raises UnavailableError when one of them is killed.
    """

    def __init__(self, pool: ProcessPoolExecutor, workers: int) -> None:
        self._pool = pool
        self.workers = workers

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        if len(items) < 2:
            return [function(item) for item in items]
        try:
            with _ctrl_c_held_back():  # from the processes that this starts: their tracebacks would be no answer
                answers = self._pool.map(function, items)
            return list(answers)
        except BrokenProcessPool as error:
            raise UnavailableError(
                "A process that simulates was killed, most often for want of memory; try --workers 1."
            ) from error


@contextmanager
def local_mapper(workers: int = 0) -> Iterator[Mapper]:
    """`workers` processes, 0 for one per core; they start when first needed and are gone at the end, on Ctrl-C too.

    They are spawned, not forked: the caller may have threads.
    """
    count = workers or available_cores()
    if count == 1:
        yield Serial()
        return
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent)
    try:
        yield Processes(pool, count)
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()  # nobody waits for what they compute
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """A Ctrl-C that comes meanwhile is delivered afterwards. Processes started meanwhile never see one."""
    resource_tracker.ensure_running()  # its own start would let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """A helper whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a helper was started by somebody"

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))

"""Parallel execution on the cores of this machine."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Protocol, TypeVar

from tandem.core.errors import UnavailableError

T = TypeVar("T")
R = TypeVar("R")

_TERMINATING = (signal.SIGTERM, signal.SIGHUP)
_END_S = 2.0  # for idle processes to end by themselves


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

    Each process has a pipe of its own, and the caller waits for all of them at once. There are no threads and no locks
    that a process could leave behind when it is killed, or the caller when it is interrupted: `close` ends all
    processes at any moment. (concurrent.futures has a thread of its own, which failed at a future that an interrupt had
    cancelled, and the interpreter then waited for another thread for ever.)
    """

    def __init__(self, workers: int) -> None:
        """The processes start at the first use."""
        self.workers = workers
        self._processes: dict[Connection, multiprocessing.process.BaseProcess] = {}

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Raises what the function raises, and UnavailableError when a process is killed. After either, new processes
        start with the next call."""
        if len(items) < 2:
            return [function(item) for item in items]
        try:
            return self._map(function, items)
        except Exception:
            self.close(now=True)  # the other processes have results that nobody waits for
            raise

    def close(self, *, now: bool) -> None:
        """End all processes; `now`: whatever they compute."""
        with _signals_blocked():
            for pipe, process in self._processes.items():
                pipe.close()
                if not now:
                    process.join(_END_S)
                process.kill()
                process.join()
            self._processes.clear()

    def _map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        if not self._processes:
            self._start()
        pickled = ForkingPickler.dumps(function)  # with its bound arguments, which may be large: once for all items
        results: dict[int, R] = {}
        waiting = iter(enumerate(items))
        busy: dict[Connection, int] = {}  # which item it has
        started = list(self._processes)[: len(items)]
        try:
            for pipe, (index, item) in zip(started, waiting, strict=False):
                pipe.send_bytes(pickled)
                pipe.send((item,))
                busy[pipe] = index
            while busy:
                for ready in connection.wait(list(busy)):
                    assert isinstance(ready, Connection)
                    result, error = ready.recv()
                    if error is not None:
                        raise error
                    results[busy.pop(ready)] = result
                    if (following := next(waiting, None)) is not None:
                        busy[ready], item = following
                        ready.send((item,))
            for pipe in started:
                pipe.send(None)
        except (EOFError, ConnectionError) as error:
            raise UnavailableError(
                "A simulation process was killed, probably because memory ran out; try --workers 1."
            ) from error
        return [results[index] for index in range(len(items))]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # not forked: the caller may have threads
        with _signals_blocked():  # also in the processes: they print no tracebacks at Ctrl-C
            for _ in range(self.workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._processes[ours] = process


@contextmanager
def local_mapper(workers: int = 0) -> Iterator[Mapper]:
    """`workers` processes, 0 for one per core. They start at the first use and end with the context, on Ctrl-C too."""
    count = workers or available_cores()
    if count == 1:
        yield SerialMapper()
        return
    mapper = ProcessMapper(count)
    try:
        yield mapper
    except BaseException:
        mapper.close(now=True)
        raise
    mapper.close(now=False)


def _work(pipe: Connection) -> None:
    """A process: a function, items for it one by one, None; then the next function."""
    _end_with_parent()
    while True:
        try:
            function = ForkingPickler.loads(pipe.recv_bytes())
            while (message := pipe.recv()) is not None:
                pipe.send(_call(function, message[0]))
        except (EOFError, ConnectionError):
            return


def _call(function: Callable[[T], R], item: T) -> tuple[R | None, Exception | None]:
    try:
        return function(item), None
    except Exception as error:  # noqa: BLE001 - raised in the calling process
        error.add_note(traceback.format_exc())
        return None, error


def _end_with_parent() -> None:
    """Ends this process with SIGTERM, and when its parent is killed, whatever it computes."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TERMINATING)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker process has a parent"

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Delays Ctrl-C and other signals that end this process until the end of the context: an interrupt in the middle of
    a start would leave a process that nobody ends. Processes started in the context block Ctrl-C for ever."""
    resource_tracker.ensure_running()  # its start would unblock signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *_TERMINATING))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))

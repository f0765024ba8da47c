"""A thread that runs the jobs on one object, one after another."""

import queue
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class OwnerThread:
    """Runs jobs in the order they were submitted. The thread is a daemon: one stuck in a dead peer's socket until its
    timeout does not delay the end of the process."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @classmethod
    def start(cls, name: str) -> "OwnerThread":
        owner = cls(name)
        owner._thread.start()
        return owner

    def submit(self, job: Callable[[], Result]) -> Future[Result]:
        """The future carries the job's result or error. Cancelling it drops a job that has not begun."""
        future: Future[Result] = Future()
        self._jobs.put((future, job))
        return future

    def stop(self) -> None:
        """End the thread after the jobs submitted so far. Does not wait."""
        self._jobs.put(None)

    def join(self, timeout_s: float) -> bool:
        """True when the thread has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:  # noqa: BLE001 - the thread that waits for the job gets it
                    _clear_frames(error)
                    future.set_exception(error)
            del item, future, job  # they reference objects of the job, and the next job may come much later


def _clear_frames(error: BaseException | None) -> None:
    """Drop the local variables of the frames that an error came through: the error may be kept for long, and they hold
    memory, sockets and threads that the job used."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

"""Processes of a controller: how they are started, and how the controller learns of their end.

The controller calls `adopt_orphans` once. From then on the kernel makes it the parent of each descendant whose own
parent ends, so it can wait for the process and gets its exit status. Most end with it: see `core.parent_process`. Those
that outlive their controller (`deploy.hosted_process`) are not the next controller's children: it learns of their end,
but not of their exit status.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from tandem.core.parent_process import prctl

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.01


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends. Raises OSError where the kernel has no such call."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def spawn(command: Sequence[str], environment: Mapping[str, str], log_path: str) -> int:
    """Start `command` in a session of its own, with its output appended to `log_path`, and return its pid. Nothing here
    is its parent: the shell that starts it ends at once."""
    script = 'log=$1; shift; "$@" >>"$log" 2>&1 & echo $!'
    started = subprocess.run(
        ["/bin/sh", "-c", script, "sh", log_path, *command],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        check=True,
    )
    return int(started.stdout)


class ChildProcess:
    """A process by its pid, mostly a child of this one. Made on an event loop, which learns of its end. `wait` for it,
    `end` it, or `release` it."""

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError if there is no such process."""
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[str] = self._loop.create_future()
        self._loop.add_reader(self._descriptor, self._on_end)

    async def wait(self) -> str:
        """Wait for its end; returns the signal's name or "exit status N"."""
        return await asyncio.shield(self._end)

    async def end(self, timeout_s: float = 10.0) -> None:
        """Kill it, and wait until it has ended. A stopped process ends as well."""
        if not self._end.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
            await asyncio.wait((self._end,), timeout=timeout_s)

    def release(self) -> None:
        """Leave the process as it is, and learn nothing more of it."""
        if not self._end.done():
            self._end.cancel()
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)

    def _on_end(self) -> None:
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        how = "exit status unknown"
        with contextlib.suppress(ChildProcessError):  # the kernel has not made it our child
            _, status = os.waitpid(self.pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status)
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        if not self._end.done():
            self._end.set_result(how)


def processes_that_use(folder: Path) -> list[psutil.Process]:
    """This user's processes that have files of `folder` open, or name it in their arguments."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error, OSError):
            if any(_is_below(text, folder) for text in _texts_of(process)):
                found.append(process)
    return found


def _texts_of(process: psutil.Process) -> Iterable[str]:
    yield from process.cmdline()
    descriptors = Path(f"/proc/{process.pid}/fd")
    for descriptor in os.listdir(descriptors):  # psutil's own look-up stats each file
        with contextlib.suppress(OSError):
            yield os.readlink(descriptors / descriptor)


def _is_below(text: str, folder: Path) -> bool:
    return f"{folder}/" in text or text.endswith(str(folder))


def kill_all(processes: Iterable[psutil.Process], timeout_s: float = 10.0) -> None:
    """Kill them and wait until they have ended; our own children among them leave no zombies."""
    killed = list(processes)
    for process in killed:
        with contextlib.suppress(psutil.Error):
            process.kill()
    until_s = time.monotonic() + timeout_s
    while any(_runs(process) for process in killed) and time.monotonic() < until_s:
        time.sleep(_POLL_S)
    for process in killed:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False

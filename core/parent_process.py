"""Lets a process end with its parent."""

import ctypes
import os
import signal
import time

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.01


def end_with_parent(parent: int, timeout_s: float) -> bool:
    """Wait until `parent` is this process's parent; from then on the kernel kills this process when it ends.

    This also works for a parent that is killed, and while this process is stopped. The kernel reacts to the end of the
    parent's thread that has started this process. False if `parent` does not become the parent within `timeout_s`.
    """
    until_s = time.monotonic() + timeout_s
    while os.getppid() != parent:
        if time.monotonic() > until_s:
            return False
        time.sleep(_POLL_S)
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent  # the parent may have ended just before the call


def outlive_parent() -> None:
    """Undo `end_with_parent`."""
    prctl(_PR_SET_PDEATHSIG, 0)


def prctl(option: int, value: int) -> None:
    """Linux's prctl(2) with one argument. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")

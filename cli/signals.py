"""Signals of a foreground process: stop, and stop at once."""

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from typing import Any

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """SIGINT, SIGTERM, SIGHUP: stop; again: force."""

    def __init__(self) -> None:
        self.stop, self.force = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in _STOP:
            loop.add_signal_handler(number, self._on_stop)

    def _on_stop(self) -> None:
        (self.force if self.stop.is_set() else self.stop).set()

    async def unless_stopped(self, work: Coroutine[Any, Any, object]) -> None:
        """Do `work` until it is done or a signal says stop."""
        task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(self.stop.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            task.result()


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Until the event loop takes over, SIGTERM and SIGHUP do what Ctrl-C does."""
    before = {number: signal.getsignal(number) for number in _STOP}
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Cleaning up at the end takes a second and must not be cut short."""
    for number in _STOP:
        signal.signal(number, signal.SIG_IGN)

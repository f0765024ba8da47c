"""Signals of a foreground process: stop, stop at once, and a request of `tandem scale`."""

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from typing import Any

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """SIGINT, SIGTERM, SIGHUP: stop; again: force. SIGUSR1: `tandem scale` has left a request."""

    def __init__(self) -> None:
        self.stop, self.force = asyncio.Event(), asyncio.Event()
        self._scale, self._any = False, asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in _STOP:
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGUSR1, self._on_scale)

    def _on_stop(self) -> None:
        (self.force if self.stop.is_set() else self.stop).set()
        self._any.set()

    def _on_scale(self) -> None:
        self._scale = True
        self._any.set()

    async def changed(self) -> None:
        await self._any.wait()
        self._any.clear()

    def take_scale(self) -> bool:
        asked, self._scale = self._scale, False
        return asked

    async def unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
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

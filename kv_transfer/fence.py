"""Ends all writes into blocks, at a moment that the caller determines."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tandem.core.errors import TransferError
from tandem.kv_transfer.owner_thread import OwnerThread


class WriteFence:
    """Forbids late writes into blocks: once `close` has returned, nothing more is written under this fence."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held by the thread that writes
        self._closed = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around each write, in the writing thread. Raises TransferError once the fence is closed."""
        with self._lock:
            if self._closed:
                raise TransferError("the transfer was given up")
            yield

    async def close(self) -> None:
        """Return when the write under way, if any, is done; a cancellation takes effect only then.

        The wait has a thread of its own: on a GPU the write may be queued behind other work of the device.
        """
        self._closed = True
        if self._lock.acquire(blocking=False):
            self._lock.release()
            return
        waiter = OwnerThread.start("kv-fence")
        written = asyncio.wrap_future(waiter.submit(self._wait))
        waiter.stop()
        cancelled: asyncio.CancelledError | None = None
        while not written.done():
            try:
                await asyncio.shield(written)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    def _wait(self) -> None:
        with self._lock:
            pass

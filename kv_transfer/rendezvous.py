"""Where the two ranks of a process group find each other: a few small blobs over our own control channel.

torch's TCPStore would listen on every interface, without authentication, and answer slowly when crowded.
"""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Protocol

from torch._C._distributed_c10d import Store

from core.errors import DeadlineError, TransferError
from core.transfer import PeerControl

_MAX_KEYS = 16
_MAX_VALUE_BYTES = 64 << 10


class Board(Protocol):
    """Named blobs, each written once, that both ranks of one link see."""

    def post(self, key: str, value: bytes) -> None: ...

    def read(self, key: str, timeout_s: float) -> bytes:
        """Wait until the key is there. Raises DeadlineError."""
        ...


class LocalBoard:
    """The board itself, on the prefill side: its own rank reads it directly, decode's over the control channel."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, Future[bytes]] = {}

    def _slot(self, key: str) -> "Future[bytes]":
        with self._lock:
            if key not in self._values and len(self._values) >= _MAX_KEYS:
                raise TransferError("too many rendezvous keys")
            return self._values.setdefault(key, Future())

    def post(self, key: str, value: bytes) -> None:
        if len(value) > _MAX_VALUE_BYTES:
            raise TransferError("a rendezvous value is too long")
        slot = self._slot(key)
        if slot.done():
            raise TransferError("a rendezvous key was written twice")
        slot.set_result(value)

    def read(self, key: str, timeout_s: float) -> bytes:
        try:
            return self._slot(key).result(timeout_s)
        except TimeoutError as error:
            raise DeadlineError("the peer did not come to the rendezvous") from error

    async def read_async(self, key: str, timeout_s: float) -> bytes:
        waiter = asyncio.wrap_future(self._slot(key))
        try:
            return await asyncio.wait_for(asyncio.shield(waiter), timeout_s)
        except TimeoutError as error:
            raise DeadlineError("the peer did not come to the rendezvous") from error


class RemoteBoard:
    """Decode's view of the board. Called in the pair's owner thread while `loop` runs in another."""

    def __init__(self, peer: PeerControl, link_id: str, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self._peer = peer
        self._link_id = link_id
        self._loop = loop
        self._timeout_s = timeout_s

    def post(self, key: str, value: bytes) -> None:
        call = self._peer.rendezvous_set(self._link_id, key, value, self._timeout_s)
        asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def read(self, key: str, timeout_s: float) -> bytes:
        call = self._peer.rendezvous_get(self._link_id, key, timeout_s)
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()


class BoardStore(Store):
    """A board in the shape torch's process groups ask for. They use `set`, `wait` and `get`."""

    def __init__(self, board: Board, timeout_s: float) -> None:
        super().__init__()
        self._board = board
        self._timeout_s = timeout_s

    def set(self, key: str, value: bytes | str) -> None:
        self._board.post(key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self._board.read(key, self._timeout_s)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self._board.read(key, self._timeout_s if timeout is None else timeout.total_seconds())

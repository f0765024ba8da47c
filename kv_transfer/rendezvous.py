"""Where the two ranks of a process group find each other: a few small blobs over our own control channel.

torch's TCPStore would listen on every interface, without authentication, and answer slowly when crowded.
"""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from torch._C._distributed_c10d import Store

from tandem.core.errors import DeadlineError, TransferError
from tandem.core.transfer import PeerControl

Value = TypeVar("Value")

_MAX_KEYS = 16
_MAX_VALUE_BYTES = 64 << 10


class Board(Protocol):
    """Named blobs, each written once, that both ranks of one link see."""

    def post(self, key: str, value: bytes) -> None: ...

    def read(self, key: str, timeout_s: float) -> bytes:
        """Wait until the key is there. Raises DeadlineError, or TransferError once the board is closed."""
        ...

    def close(self) -> None:
        """Nobody will come any more: end all waits. Never waits itself."""
        ...


class LocalBoard:
    """The board itself, on the prefill side: its own rank reads it directly, decode's over the control channel."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, Future[bytes]] = {}
        self._closed = False

    def _slot(self, key: str) -> "Future[bytes]":
        with self._lock:
            if self._closed:
                raise TransferError("the KV link has ended")
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

    def close(self) -> None:
        with self._lock:
            self._closed = True
            waiting = [slot for slot in self._values.values() if not slot.done()]
        for slot in waiting:
            slot.set_exception(TransferError("the KV link has ended"))

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
        self._call: Future[Any] | None = None

    def post(self, key: str, value: bytes) -> None:
        self._wait(self._peer.rendezvous_set(self._link_id, key, value, self._timeout_s))

    def read(self, key: str, timeout_s: float) -> bytes:
        return self._wait(self._peer.rendezvous_get(self._link_id, key, timeout_s))

    def close(self) -> None:
        if self._call is not None:
            self._call.cancel()

    def _wait(self, call: Coroutine[Any, Any, Value]) -> Value:
        self._call = future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except CancelledError as error:
            raise TransferError("the KV link has ended") from error


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

"""The store in which the two ranks of a process group find each other: a few small values over our control channel.

torch's TCPStore would listen on every interface, without authentication, and answer slowly when crowded.
"""

import asyncio
import threading
from abc import abstractmethod
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from datetime import timedelta
from typing import Any, TypeVar

from torch._C._distributed_c10d import Store

from tandem.core.errors import DeadlineError, TransferError
from tandem.core.transfer import PeerControl

Value = TypeVar("Value")

_MAX_KEYS = 16
_MAX_VALUE_BYTES = 64 << 10


class RendezvousStore(Store):
    """Values under names, each written once, that both ranks of one link see. torch's process groups use `set`, `wait`
    and `get`, in the link's owner thread. All raise TransferError: after `timeout_s`, or once the store is closed."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self._timeout_s = timeout_s

    def set(self, key: str, value: bytes | str) -> None:
        self.put(key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self.read(key, self._timeout_s)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.read(key, self._timeout_s if timeout is None else timeout.total_seconds())

    @abstractmethod
    def put(self, key: str, value: bytes) -> None: ...

    @abstractmethod
    def read(self, key: str, timeout_s: float) -> bytes:
        """Wait until the key has a value."""

    @abstractmethod
    def close(self) -> None:
        """End all waits, now and later. From any thread; never waits itself."""


class LocalRendezvousStore(RendezvousStore):
    """The prefill side holds the values: its own rank reads them here, decode's rank over the control channel."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self._lock = threading.RLock()
        self._values: dict[str, Future[bytes]] = {}
        self._closed = False

    def put(self, key: str, value: bytes) -> None:
        if len(value) > _MAX_VALUE_BYTES:
            raise TransferError("a rendezvous value is too long")
        with self._lock:
            slot = self._slot(key)
            if slot.done():
                raise TransferError("a rendezvous key was written twice")
            slot.set_result(value)

    def read(self, key: str, timeout_s: float) -> bytes:
        try:
            return self._slot(key).result(timeout_s)
        except TimeoutError as error:
            raise TransferError("the peer did not come to the rendezvous in time") from error

    async def read_async(self, key: str, timeout_s: float) -> bytes:
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._slot(key))), timeout_s)
        except TimeoutError as error:
            raise TransferError("the peer did not come to the rendezvous in time") from error

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for slot in self._values.values():
                if not slot.done():
                    slot.set_exception(TransferError("the KV link has ended"))

    def _slot(self, key: str) -> "Future[bytes]":
        with self._lock:
            if self._closed:
                raise TransferError("the KV link has ended")
            if key not in self._values and len(self._values) >= _MAX_KEYS:
                raise TransferError("too many rendezvous keys")
            return self._values.setdefault(key, Future())


class RemoteRendezvousStore(RendezvousStore):
    """Decode's view of the values. Its calls run on `loop`, which is not the loop of a thread that uses the store."""

    def __init__(self, peer: PeerControl, link_id: str, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self._peer = peer
        self._link_id = link_id
        self._loop = loop
        self._call: Future[Any] | None = None
        self._closed = False

    def put(self, key: str, value: bytes) -> None:
        self._result_of(self._peer.rendezvous_set(self._link_id, key, value, self._timeout_s))

    def read(self, key: str, timeout_s: float) -> bytes:
        return self._result_of(self._peer.rendezvous_get(self._link_id, key, timeout_s))

    def close(self) -> None:
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    def _result_of(self, call: Coroutine[Any, Any, Value]) -> Value:
        self._call = future = asyncio.run_coroutine_threadsafe(call, self._loop)
        if self._closed:
            future.cancel()
        try:
            return future.result()
        except CancelledError as error:
            raise TransferError("the KV link has ended") from error
        except DeadlineError as error:
            raise TransferError("the peer did not come to the rendezvous in time") from error

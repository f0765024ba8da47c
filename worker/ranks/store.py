"""The store in which process groups of an instance's ranks find each other: small values over the ranks' channels."""

import struct
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Store

from tandem.engine.collectives.interface import RankLostError

_KEY_LENGTH = struct.Struct("<H")
_TIMEOUT_S = 300.0  # a backstop: ranks that are lost close the store


class RankStore(Store):
    """One rank's copy of the values, each of which one rank has set. `publish` sends what this rank sets, as `encode`
    has it, to the other ranks, which `put` it. torch's process groups use `set`, `wait` and `get`.

    `get` and `wait` raise RankLostError: after a time-out, or once the store is closed.
    """

    def __init__(self, publish: Callable[[bytes], None]) -> None:
        super().__init__()
        self._publish = publish
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        name = key.encode()
        self._publish(_KEY_LENGTH.pack(len(name)) + name + data)
        self._keep(key, data)

    def put(self, encoded: bytes) -> None:
        """Keep a value that another rank has set."""
        (length,) = _KEY_LENGTH.unpack_from(encoded)
        name = encoded[_KEY_LENGTH.size : _KEY_LENGTH.size + length]
        self._keep(name.decode(), encoded[_KEY_LENGTH.size + length :])

    def get(self, key: str) -> bytes:
        return self._wait_for(key, _TIMEOUT_S)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        until_s = time.monotonic() + (_TIMEOUT_S if timeout is None else timeout.total_seconds())
        for key in keys:
            self._wait_for(key, until_s - time.monotonic())

    def close(self) -> None:
        """End all waits, now and later. From any thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _keep(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def _wait_for(self, key: str, timeout_s: float) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or key in self._values, max(0.0, timeout_s))
            if self._closed or key not in self._values:
                raise RankLostError("the ranks of the instance did not connect")
            return self._values[key]

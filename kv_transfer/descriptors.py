"""Hands a file descriptor to another process of the same host and user, over an abstract Unix socket.

The prefill worker offers the descriptors of its ranks' pools; decode gets the socket's name and a nonce for each over
the control channel. The kernel proves the peer's user; the nonce proves that this process made a link with the peer.
"""

import logging
import os
import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

from tandem.core.errors import TransferError
from tandem.core.transfer import HostIdentity

_log = logging.getLogger(__name__)

NONCE_BYTES = 32
_SOCKET_TIMEOUT_S = 1.0
_RETRY_S = 0.1  # after an error of `accept`
_MAX_NONCES = 1024  # not used yet; the oldest are dropped first


def host_identity() -> HostIdentity:
    """This process's kernel (fresh at each boot) with its network namespace, and its user. The socket that hands a
    descriptor over can be reached in one network namespace only, so two containers of one host are two hosts here."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        host = f"{boot_id}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        host = f"unknown-{secrets.token_hex(16)}"  # equal to no other
    return HostIdentity(host, os.getuid())


class DescriptorServer:
    """Sends read-only copies of descriptors, one a nonce. Its thread only accepts connections, until `close`.

    An error (too many open files, say) is logged, and the next connection is served.
    """

    def __init__(self, listener: socket.socket, fds: Sequence[int]) -> None:
        self._listener = listener
        self._fds = fds
        self._nonces: dict[bytes, int] = {}  # each is for one of the descriptors
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="kv-descriptors", daemon=True)

    @classmethod
    def start(cls, fds: Sequence[int]) -> "DescriptorServer":
        """`fds` stay the caller's, and are duplicated read-only here."""
        read_only = [os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC) for fd in fds]
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"\0tandem-kv-{secrets.token_hex(16)}")
        listener.listen(64)
        server = cls(listener, read_only)
        server._thread.start()
        return server

    @property
    def name(self) -> str:
        name: bytes = self._listener.getsockname()
        return name[1:].decode()

    def issue_nonce(self, index: int) -> bytes:
        """A nonce that is valid once, for the descriptor at that index."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        with self._lock:
            if len(self._nonces) >= _MAX_NONCES:
                del self._nonces[next(iter(self._nonces))]
            self._nonces[nonce] = index
        return nonce

    def close(self) -> None:
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._listener.close()
        for fd in self._fds:
            os.close(fd)

    def _serve(self) -> None:
        has_failed = False
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not has_failed and not self._closing.is_set():
                    _log.error("no other worker can be given the KV pool: %s; trying again", error)
                has_failed = True
                self._closing.wait(_RETRY_S)
                continue
            has_failed = False
            with connection:
                try:
                    self._send_descriptor(connection)
                except OSError:
                    continue  # the other side is gone, or was too slow
                except Exception:  # noqa: BLE001 - the thread serves the others
                    _log.exception("a worker could not be given the KV pool")

    def _send_descriptor(self, connection: socket.socket) -> None:
        connection.settimeout(_SOCKET_TIMEOUT_S)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", credentials)
        if uid != os.getuid():
            return
        nonce = connection.recv(NONCE_BYTES, socket.MSG_WAITALL)
        with self._lock:
            index = self._nonces.pop(nonce, None)
        if index is not None:
            socket.send_fds(connection, [b"k"], [self._fds[index]])


def fetch_descriptor(name: str, nonce: bytes) -> int:
    """The descriptor that `nonce` gives a right to; the caller closes it. Raises TransferError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(2 * _SOCKET_TIMEOUT_S)
            connection.connect(f"\0{name}")
            connection.sendall(nonce)
            message, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    except OSError as error:
        raise TransferError("the prefill worker's memory cannot be reached from here") from error
    if not message or len(descriptors) != 1:
        for fd in descriptors:
            os.close(fd)
        raise TransferError("the prefill worker did not share its memory")
    return descriptors[0]

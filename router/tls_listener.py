"""Accepts connections and makes their TLS handshakes, with limits that an event loop's own listener lacks.

Until its handshake is over, a connection is not among those that the HTTP server counts. At most `_MAX_HANDSHAKES` are
kept in their handshakes; the oldest of these is cut off for a new one, because an honest client needs milliseconds.
"""

import asyncio
import logging
import socket
from collections.abc import Callable

from tandem.wire.server_tls import ServerTls

_LOG = logging.getLogger(__name__)

_MAX_HANDSHAKES = 128
_PAUSE_S = 0.1


class TlsListener:
    """`listener` listens, without blocking. `make_protocol` makes the protocol of one connection; `timeout_s` bounds a
    handshake."""

    def __init__(
        self, listener: socket.socket, make_protocol: Callable[[], asyncio.Protocol], tls: ServerTls, timeout_s: float
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._tls = tls
        self._timeout_s = timeout_s
        self._handshakes: dict[asyncio.Task[None], None] = {}  # the oldest first

    async def run(self) -> None:
        """Until cancelled, which ends handshakes too, and not the connections that were made."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection, _ = await loop.sock_accept(self._listener)
                except OSError as error:  # too many open files, or a client that has gone
                    _LOG.warning("a connection could not be accepted: %s", error)
                    await asyncio.sleep(_PAUSE_S)
                    continue
                if len(self._handshakes) >= _MAX_HANDSHAKES:
                    next(iter(self._handshakes)).cancel()
                task = asyncio.create_task(self._handshake(connection), name="TLS handshake")
                self._handshakes[task] = None
                task.add_done_callback(self._handshakes.pop)
        finally:
            for task in self._handshakes:
                task.cancel()
            await asyncio.gather(*self._handshakes, return_exceptions=True)

    async def _handshake(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        context = self._tls.http_context()
        try:
            await loop.connect_accepted_socket(
                self._make_protocol, connection, ssl=context, ssl_handshake_timeout=self._timeout_s
            )
        except OSError as error:  # also ssl.SSLError and TimeoutError
            _LOG.info("a TLS handshake failed: %s", error)
            connection.close()
        except BaseException:
            connection.close()
            raise

"""The HTTP server: uvicorn with a C parser, on a socket that is bound before the server starts."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from tandem.core.address import split_address
from tandem.core.errors import ConfigError
from tandem.core.router_section import RouterSection
from tandem.router.http_connection import NUM_RESERVED, HttpConfig, HttpConnection
from tandem.router.tls_listener import TlsListener
from tandem.wire.server_tls import ServerTls

_BACKLOG = 2048
_OTHER_DESCRIPTORS = 256  # of gRPC, files and the event loop
_RECEIVE_BUFFER_BYTES = 128 << 10  # in the kernel, for each connection
_SEND_BUFFER_BYTES = 256 << 10


def raise_descriptor_limit() -> int:
    """Let the process open as many descriptors as it may; returns their number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _connection_limit(max_connections: int) -> int:
    """The configured number of connections, or fewer, so that the rest of the process has enough descriptors."""
    num_descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_descriptors == resource.RLIM_INFINITY:
        return max_connections
    return max(1, min(max_connections, num_descriptors - _OTHER_DESCRIPTORS - NUM_RESERVED))


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process handles signals, since it runs more than this server."""
        yield


class HttpServer:
    """Serves one ASGI application on `settings.http` (port 0: any free port). `start`, then `stop`, once each.

    It keeps connections within the settings' limits, and within the process's limit of descriptors. `tls` has been
    loaded; None: plain HTTP.
    """

    def __init__(
        self, app: Any, settings: RouterSection, tls: ServerTls | None = None, *, stop_timeout_s: float = 5.0
    ) -> None:
        self._address = settings.http
        self._handshake_timeout_s = settings.header_timeout_s
        self._tls = tls
        config = HttpConfig(
            app,
            settings,
            _connection_limit(settings.max_connections),
            loop="none",  # the process has chosen the event loop
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=settings.idle_timeout_s,
            timeout_graceful_shutdown=max(1, round(stop_timeout_s)),
            backlog=_BACKLOG,
        )
        self._config = config
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None

    async def start(self) -> str:
        """Bind and serve; returns the address with the actual port. Raises ConfigError for an unusable address."""
        host, port = split_address(self._address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES
            )  # its connections inherit it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            listener.bind((host, port))
        except OSError as error:
            listener.close()
            raise ConfigError(f"cannot listen on {self._address}: {error.strerror or error}") from error
        self._listener = listener
        self._task = asyncio.create_task(self._server.serve(sockets=[listener] if self._tls is None else []))
        while not self._server.started:
            if self._task.done():
                await self._task
                raise ConfigError(f"cannot listen on {self._address}: the HTTP server ended at once")
            await asyncio.sleep(0.005)
        if self._tls is not None:
            listener.setblocking(False)
            listener.listen(_BACKLOG)
            tls_listener = TlsListener(listener, self._make_connection, self._tls, self._handshake_timeout_s)
            self._accepting = asyncio.create_task(tls_listener.run())
        bound = listener.getsockname()[1]
        return f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"

    def _make_connection(self) -> HttpConnection:
        """As uvicorn does for sockets that it listens on."""
        server = self._server
        return HttpConnection(config=self._config, server_state=server.server_state, app_state=server.lifespan.state)

    async def wait_closed(self) -> None:
        """Returns when the server has ended; raises what ended it."""
        assert self._task is not None, "start first"
        tasks = [task for task in (self._task, self._accepting) if task is not None]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def stop(self) -> None:
        """Refuse new requests, wait for running ones for `stop_timeout_s` at most, then abort them."""
        self._server.should_exit = True
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)  # `wait_closed` raises its error
        for server in self._server.servers:  # still open if the task has failed
            server.close()
        if self._listener is not None:
            self._listener.close()

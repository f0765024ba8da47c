"""The HTTP server: uvicorn with a C parser, on a socket that is bound before the server starts."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from tandem.core.config import split_address
from tandem.core.errors import ConfigError


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process handles signals, since it runs more than this server."""
        yield


class HttpServer:
    """Serves one ASGI application on `address` (host:port; port 0: any free port). `start`, then `stop`, once each."""

    def __init__(self, app: Any, address: str, *, stop_timeout_s: float = 5.0) -> None:
        self._address = address
        config = uvicorn.Config(
            app,
            loop="none",  # the process has chosen the event loop
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=max(1, round(stop_timeout_s)),
            backlog=2048,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None

    async def start(self) -> str:
        """Bind and serve; returns the address with the actual port. Raises ConfigError for an unusable address."""
        host, port = split_address(self._address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
        except OSError as error:
            listener.close()
            raise ConfigError(f"cannot listen on {self._address}: {error.strerror or error}") from error
        self._listener = listener
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            if self._task.done():
                await self._task
                raise ConfigError(f"cannot listen on {self._address}: the HTTP server ended at once")
            await asyncio.sleep(0.005)
        bound = listener.getsockname()[1]
        return f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"

    async def wait_closed(self) -> None:
        """Returns when the server has ended; raises what ended it."""
        assert self._task is not None, "start first"
        await asyncio.shield(self._task)

    async def stop(self) -> None:
        """Refuse new requests, wait for running ones for `stop_timeout_s` at most, then abort them."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)  # `wait_closed` raises its error
        for server in self._server.servers:  # still open if the task has failed
            server.close()
        if self._listener is not None:
            self._listener.close()

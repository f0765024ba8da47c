"""One HTTP connection: uvicorn's protocol with the limits that uvicorn lacks.

    connected --first byte--> head --> body --> idle --first byte--> head ...
        | header_timeout_s     |        | body_timeout_s   | idle_timeout_s
        v                      v        v                  v
      closed                  408      408               closed

A request that is refused here never reaches the application. Its response waits for those of earlier requests on the
connection; then the connection is closed. A client that does not read its response for `write_timeout_s` is cut off.
"""

import asyncio
import logging
from collections import Counter
from enum import Enum, auto
from http import HTTPStatus
from typing import Any

import httptools
import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tandem.core.errors import (
    HeadersTooLargeError,
    InvalidRequestError,
    OverloadedError,
    RequestTimeoutError,
    TandemError,
    UnavailableError,
)
from tandem.core.router_section import RouterSection
from tandem.router.openai.responses import error_body

_LOG = logging.getLogger(__name__)

NUM_RESERVED = 64  # connections beyond the limit; they get health and metrics
_OPEN_PATHS = (b"/health", b"/readyz", b"/livez", b"/metrics")
_RESERVED_TIMEOUT_S = 1.0
_MAX_PIPELINED = 16
_MAX_CHUNKS = 1 << 16  # of one body
_SLICE_BYTES = 4096  # after each slice the size of a head is checked
_LINGER_S = 1.0  # a reset by an early close would lose the response
_FIRST_PROBE_S = 0.02
_LAST_PROBE_S = 1.0
_PROBE = b"HTTP/1.1 102 Processing\r\n\r\n"


class HttpConfig(uvicorn.Config):
    """uvicorn's settings, and those of Tandem's connections. At most `max_connections` get more than `/health`."""

    def __init__(self, app: Any, settings: RouterSection, max_connections: int, **options: Any) -> None:
        super().__init__(app, http=HttpConnection, **options)
        self.settings = settings
        self.max_connections = max_connections
        self.num_of_address: Counter[str] = Counter()  # connections; the protocols of one server count here


class _Phase(Enum):
    IDLE = auto()
    HEAD = auto()
    BODY = auto()


class HttpConnection(HttpToolsProtocol):
    """Used by uvicorn, one for each connection."""

    config: HttpConfig

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._settings = self.config.settings
        self._is_reserved = False
        self._address = ""
        self._phase = _Phase.IDLE
        self._num_loose_bytes = 0  # since the parser has last reported something whole, other than a header
        self._num_chunks = 0
        self._active: RequestResponseCycle | None = None  # its response is being made
        self._refusal: TandemError | None = None  # of whatever the client has sent last
        self._arrival_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None

    # --- connection --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        num_over = len(self.connections) - self.config.max_connections
        self._address = "" if self.client is None else self.client[0]
        self.config.num_of_address[self._address] += 1
        if self.config.num_of_address[self._address] > self._settings.max_client_connections:
            self._refuse_connection(
                UnavailableError(
                    f"{self._settings.max_client_connections} connections of one client are in use; try again later."
                )
            )
            return
        if num_over > NUM_RESERVED:
            self._refuse_connection(self._all_in_use())
            return
        self._is_reserved = num_over > 0
        self._start_arrival_timer(_RESERVED_TIMEOUT_S if self._is_reserved else self._settings.header_timeout_s)

    def _refuse_connection(self, error: TandemError) -> None:
        self._refusal = error
        self.transport.write(_response_bytes(error))
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.config.num_of_address[self._address] -= 1
        if not self.config.num_of_address[self._address]:
            del self.config.num_of_address[self._address]
        for timer in (self._arrival_timer, self._write_timer, self._probe_timer):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open for writing: the client may still wait for the response to a whole request.

        A closed connection looks the same until something is sent to it, so interim responses are.
        """
        cycle = self.cycle
        is_waiting = cycle is not None and not cycle.response_complete and not cycle.more_body
        can_wait = self.transport.can_write_eof() and cycle is not None and cycle.scope["http_version"] != "1.0"
        if self._refusal is not None or not is_waiting or not can_wait:
            return False
        cycle.keep_alive = False
        self._probe(_FIRST_PROBE_S)
        return True

    def _probe(self, delay_s: float) -> None:
        if self._active is None or self.transport.is_closing():
            return
        if not self._active.response_started:
            self.transport.write(_PROBE)
        self._probe_timer = self.loop.call_later(delay_s, self._probe, min(2 * delay_s, _LAST_PROBE_S))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._settings.write_timeout_s, self._on_unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _on_unread(self) -> None:
        _LOG.info("a client has not read its response for %g s; its connection ends", self._settings.write_timeout_s)
        self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        """Also ends a connection whose last response is not read to its end."""
        if not self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    # --- what arrives ------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _SLICE_BYTES):
            if self._refusal is not None:
                return  # nothing after it has a meaning
            self._feed(data[start : start + _SLICE_BYTES])

    def _feed(self, data: bytes) -> None:
        self._num_loose_bytes += len(data)
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError as error:
                self._refuse(
                    error.__context__
                    if isinstance(error.__context__, TandemError)
                    else InvalidRequestError(f"The request is not valid HTTP/1.1: {error}.")
                )
                return
        if self._num_loose_bytes > self._settings.max_header:
            self._refuse(
                HeadersTooLargeError(f"The headers are larger than the {self._settings.max_header} bytes that fit.")
            )

    def _head_without_upgrade(self) -> bytes:
        """The server takes no offer of another protocol, but the parser takes no body after one."""
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/1.1\r\n"]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join(token for token in value.split(b",") if token.strip().lower() != b"upgrade")
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        return b"".join([*head, b"\r\n"])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._phase = _Phase.HEAD
        self._num_loose_bytes = self._num_chunks = 0
        if self._arrival_timer is None:
            self._start_arrival_timer(self._settings.header_timeout_s)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise OverloadedError(f"At most {_MAX_PIPELINED} requests may wait on one connection.")
        self._num_loose_bytes = 0
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise InvalidRequestError("This server is no proxy: it has no CONNECT.")
            return
        if self._is_reserved:
            path = self.url.partition(b"?")[0].rstrip(b"/")
            if path not in _OPEN_PATHS:
                raise self._all_in_use()
        super().on_headers_complete()
        if self._is_reserved:
            self.cycle.keep_alive = False
        self._phase = _Phase.BODY
        self._start_arrival_timer(self._settings.body_timeout_s)

    def on_body(self, body: bytes) -> None:
        self._num_loose_bytes = 0
        super().on_body(body)

    def on_chunk_header(self) -> None:
        self._num_loose_bytes = 0
        self._num_chunks += 1
        if self._num_chunks > _MAX_CHUNKS:
            raise InvalidRequestError(f"The body has more than {_MAX_CHUNKS} chunks.")

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._num_loose_bytes = 0
        self._phase = _Phase.IDLE
        self._stop_arrival_timer()
        super().on_message_complete()

    def _start_arrival_timer(self, timeout_s: float) -> None:
        self._stop_arrival_timer()
        self._arrival_timer = self.loop.call_later(timeout_s, self._on_late, timeout_s)

    def _stop_arrival_timer(self) -> None:
        if self._arrival_timer is not None:
            self._arrival_timer.cancel()
            self._arrival_timer = None

    def _on_late(self, timeout_s: float) -> None:
        self._arrival_timer = None
        if self._phase is _Phase.IDLE:
            self.transport.close()
        elif self.flow.read_paused:  # the rest may be here already
            self._start_arrival_timer(timeout_s)
        else:
            part = "headers" if self._phase is _Phase.HEAD else "body"
            self._refuse(RequestTimeoutError(f"The {part} did not arrive within {timeout_s:g} s."))

    # --- responses ---------------------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # when all is sent; a client that does not read must not keep it from closing
            self._write_timer = self._write_timer or self.loop.call_later(
                self._settings.write_timeout_s, self._on_unread
            )
        elif self._refusal is not None and not self._is_responding:
            self._send_refusal(self._refusal)

    @property
    def _is_responding(self) -> bool:
        return self._active is not None and not self._active.response_complete

    def _refuse(self, error: TandemError) -> None:
        """Respond with the error after the requests that are whole; take no more."""
        self._refusal = error
        self._stop_arrival_timer()
        if self._phase is _Phase.BODY:  # the last request is not whole
            if self.cycle is self._active:
                if self.cycle.response_started:
                    self.transport.close()
                else:
                    self.cycle.disconnected = True
                    self.cycle.message_event.set()
                    self._send_refusal(error)
                return
            self.pipeline.popleft()
        if not self._is_responding:
            self._send_refusal(error)

    def _send_refusal(self, error: TandemError) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(_response_bytes(error))
        if self.transport.can_write_eof():  # TLS has no half-closed connections
            self.transport.write_eof()
        self._unset_keepalive_if_required()
        self._arrival_timer = self.loop.call_later(_LINGER_S, self.transport.abort)

    def _all_in_use(self) -> UnavailableError:
        return UnavailableError(f"All {self.config.max_connections} connections are in use; try again later.")


def _response_bytes(error: TandemError) -> bytes:
    body = orjson.dumps(error_body(error))
    retry = "retry-after: 1\r\n" if error.retryable else ""
    head = (
        f"HTTP/1.1 {error.http_status} {HTTPStatus(error.http_status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n{retry}connection: close\r\n\r\n"
    )
    return head.encode() + body

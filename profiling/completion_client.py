"""A client of the OpenAI completions API that costs little per token: bytes in, two timestamps and the tail out.

Connections are kept, and each carries one request at a time. A request opens a new connection when none is idle, so the
client never bounds the number of concurrent requests. Responses are not parsed while they arrive; only the usage that
the server reports last is read.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools
import orjson

from tandem.profiling.errors import MeasurementError

_TAIL_BYTES = 1 << 14  # holds the last events: usage, and a timeline if it was requested
_DATA = b"data: "
_END_OF_EVENT = b"\n\n"  # JSON escapes line ends, so it is nowhere else


class ServerGoneError(MeasurementError):
    """Nothing listens at the server's address."""


@dataclass(frozen=True, slots=True)
class TimedCompletion:
    """One response. Times are on `time.monotonic`: `first_s` of the first event, `last_s` of the last.

    `usage` is the server's, None where the response was incomplete. `error` is a sentence if the request failed.
    `event_s` of every event in order, the usage and the end of the stream included.
    """

    sent_s: float
    first_s: float | None
    last_s: float
    usage: dict[str, object] | None
    error: str | None = None
    event_s: tuple[float, ...] = ()


class _Connection(asyncio.Protocol):
    """`send` may be called when the previous response is complete."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._response: asyncio.Future[TimedCompletion] | None = None
        self._clear(0.0)

    def _clear(self, sent_s: float) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._sent_s = sent_s
        self._event_s: list[float] = []
        self._first_s: float | None = None
        self._tail = b""

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes) -> "asyncio.Future[TimedCompletion]":
        assert self._transport is not None, "a request before the connection"
        assert self._response is None, "two requests at once on one connection"
        self._clear(time.monotonic())
        self._response = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._response

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._complete(f"the response is not HTTP ({error})")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._complete("the server closed the connection before the response was complete")

    # --- httptools' callbacks ---

    def on_body(self, body: bytes) -> None:
        now_s = time.monotonic()
        if self._first_s is None:
            self._first_s = now_s
        self._event_s += [now_s] * body.count(_END_OF_EVENT)
        self._tail = (self._tail + body)[-_TAIL_BYTES:] if len(body) < _TAIL_BYTES else body[-_TAIL_BYTES:]

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._first_s = None
            self._complete(f"status {status}: {_message_of(self._tail)}")
        else:
            self._complete(None)
        if not self._parser.should_keep_alive():
            self.close()

    def _complete(self, error: str | None) -> None:
        response, self._response = self._response, None
        if response is None or response.done():
            return
        usage = None
        if error is None:
            usage, error = _usage_or_error(self._tail)
        response.set_result(
            TimedCompletion(self._sent_s, self._first_s, time.monotonic(), usage, error, tuple(self._event_s))
        )


def _message_of(body: bytes) -> str:
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def _usage_or_error(tail: bytes) -> tuple[dict[str, object] | None, str | None]:
    """(usage, error) in the last events of a stream; one of them is None."""
    for line in reversed(tail.split(_END_OF_EVENT)):
        if not line.startswith(_DATA) or line.endswith(b"[DONE]"):
            continue
        try:
            event = orjson.loads(line[len(_DATA) :])
        except orjson.JSONDecodeError:
            break
        if "error" in event:
            return None, _message_of(line[len(_DATA) :])
        usage = event.get("usage")
        if isinstance(usage, dict):
            return usage, None
        break
    return None, "the response ended without its usage"


class CompletionClient:
    """Asks the server at `url` (http://host:port) for completions. `close` also ends the requests in flight."""

    def __init__(self, url: str) -> None:
        """Raises MeasurementError for another form of URL."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise MeasurementError(f"{url} is not of the form http://host:port")
        self.url = url
        self._host, self._port = parts.hostname, parts.port or 80
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    async def open(self, count: int) -> None:
        """Open `count` connections beforehand. Raises ServerGoneError."""
        self._idle += await asyncio.gather(*(self._connect() for _ in range(count)))

    async def complete(self, request: bytes, timeout_s: float) -> TimedCompletion:
        """Send bytes made by `make_request`, and wait for the complete response. Raises ServerGoneError only."""
        connection = self._take_idle() or await self._connect()
        self._busy.add(connection)
        response = connection.send(request)
        try:
            async with asyncio.timeout(timeout_s):
                return await response
        except TimeoutError:
            now_s = time.monotonic()
            return TimedCompletion(now_s - timeout_s, None, now_s, None, f"no complete response after {timeout_s:g} s")
        finally:
            self._busy.discard(connection)
            if response.cancelled():  # by the timeout, or by the caller
                connection.close()
            elif connection.is_open:
                self._idle.append(connection)

    def make_request(
        self, model: str, token_ids: Sequence[int], max_tokens: int, *, with_timeline: bool = False
    ) -> bytes:
        """A streamed, greedy request whose response has exactly `max_tokens` tokens."""
        body: dict[str, object] = {
            "model": model,
            "prompt": list(token_ids),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if with_timeline:
            body["tandem"] = {"timeline": True}
        text = orjson.dumps(body)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
        )
        return head.encode() + text

    def close(self) -> None:
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()  # the one used last: the server is least likely to have closed it
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> _Connection:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        except OSError as error:
            raise ServerGoneError(f"nothing answers at {self.url} ({error.strerror or error})") from error
        return connection

"""One HTTP request and its answer: what is known of the request, and the ways to answer it."""

from dataclasses import dataclass
from typing import Any

import orjson

from tandem.core.errors import TandemError
from tandem.router.http_body import Headers, Receive, Send, drain
from tandem.router.openai.shapes import DONE, error_body

_JSON = b"application/json"
_EVENTS = b"text/event-stream; charset=utf-8"


@dataclass(slots=True)
class Exchange:
    """`echoed_id` is the client's own x-request-id, or ours. Headers go out with the first piece of the answer."""

    request_id: str
    echoed_id: bytes
    received_s: float
    headers: Headers
    receive: Receive
    send: Send
    is_started: bool = False

    async def _start(self, status: int, content_type: bytes, *extra: tuple[bytes, bytes]) -> None:
        self.is_started = True
        headers = [(b"content-type", content_type), (b"x-request-id", self.echoed_id), *extra]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def send_whole(self, status: int, body: bytes, content_type: bytes, *extra: tuple[bytes, bytes]) -> None:
        await self._start(status, content_type, (b"content-length", str(len(body)).encode()), *extra)
        await self.send({"type": "http.response.body", "body": body})

    async def send_json(self, status: int, body: dict[str, Any], *extra: tuple[bytes, bytes]) -> None:
        await self.send_whole(status, orjson.dumps(body), _JSON, *extra)

    async def send_events(self, events: bytes, *, is_last: bool = False) -> None:
        if not self.is_started:
            await self._start(200, _EVENTS, (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
        await self.send({"type": "http.response.body", "body": events, "more_body": not is_last})

    async def fail(self, error: TandemError, *extra: tuple[bytes, bytes]) -> None:
        """A status, headers and a JSON object; after the start of a stream, which has its status already, an event."""
        body = error_body(error)
        if self.is_started:
            await self.send_events(b"data: " + orjson.dumps(body) + b"\n\n" + DONE, is_last=True)
        elif error.http_status == 413:
            await self._fail_unread(error.http_status, orjson.dumps(body))
        else:
            retry = ((b"retry-after", b"1"),) if error.retryable else ()
            await self.send_json(error.http_status, body, *retry, *extra)

    async def _fail_unread(self, status: int, body: bytes) -> None:
        """Answer while the client still sends: at once, and then close, so that the rest is not taken for a request."""
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, _JSON, length, (b"connection", b"close"))
        await self.send({"type": "http.response.body", "body": body, "more_body": True})
        await drain(self.receive)
        await self.send({"type": "http.response.body", "body": b""})

"""A client of the OpenAI completions API that costs little per token: bytes in, two time stamps and the tail out.

Kept connections, one request on each at a time; a request opens a new one when none is idle, so that how many are
answered at once is never bounded here. Answers are not looked at while they come; what is checked, at their end, is the
usage that the server reports last.
"""

import asyncio
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools
import orjson

from bench.processes import BenchError

_TAIL_BYTES = 1 << 14  # the last events fit: usage, and a timeline if it was asked for
_DATA = b"data: "


class ServerGoneError(BenchError):
    """Nothing listens where the server was."""


@dataclass(frozen=True, slots=True)
class Stamped:
    """One answer. Times are on `time.monotonic`; `first_s` is when the first event was there, `last_s` the last.

    `usage` is the server's, None where the answer was cut short; `error` says in a sentence what went wrong, if
    anything did.
    """

    sent_s: float
    first_s: float | None
    last_s: float
    usage: dict[str, object] | None
    error: str | None = None


class _Answer(asyncio.Protocol):
    """One connection. `ask` may be called when the previous answer is whole."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._whole: asyncio.Future[Stamped] | None = None
        self._clear(0.0)

    def _clear(self, sent_s: float) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._sent_s = sent_s
        self._first_s: float | None = None
        self._tail = b""

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def ask(self, request: bytes) -> "asyncio.Future[Stamped]":
        assert self._transport is not None, "a request before the connection"
        assert self._whole is None, "two requests at once on one connection"
        self._clear(time.monotonic())
        self._whole = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._whole

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._settle(f"the server answered what is not HTTP ({error})")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle("the server closed the connection before the answer was whole")

    # --- httptools' callbacks ---

    def on_body(self, body: bytes) -> None:
        if self._first_s is None:
            self._first_s = time.monotonic()
        self._tail = (self._tail + body)[-_TAIL_BYTES:] if len(body) < _TAIL_BYTES else body[-_TAIL_BYTES:]

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._first_s = None
            self._settle(f"status {status}: {_message_of(self._tail)}")
        else:
            self._settle(None)
        if not self._parser.should_keep_alive():
            self.close()

    def _settle(self, error: str | None) -> None:
        whole, self._whole = self._whole, None
        if whole is None or whole.done():
            return
        usage = None
        if error is None:
            usage, error = _ending_of(self._tail)
        whole.set_result(Stamped(self._sent_s, self._first_s, time.monotonic(), usage, error))


def _message_of(body: bytes) -> str:
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def _ending_of(tail: bytes) -> tuple[dict[str, object] | None, str | None]:
    """(usage, error) of a stream's last events."""
    for line in reversed(tail.split(b"\n\n")):
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
    return None, "the answer ended without its usage"


def served_model(url: str) -> str:
    """The name of the first model that the server at `url` serves. Blocks; raises BenchError."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=10.0) as answer:
            return str(orjson.loads(answer.read())["data"][0]["id"])
    except urllib.error.HTTPError as error:
        raise BenchError(f"{url} answers {error.code} when it is asked for its models") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ServerGoneError(f"nothing answers at {url} ({getattr(reason, 'strerror', None) or reason})") from error
    except (KeyError, IndexError, TypeError) as error:
        raise BenchError(f"{url} does not answer as an OpenAI API does") from error


class LoadClient:
    """Asks the server at `url` (http://host:port) for completions. Close it; what is under way then ends there too."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise BenchError(f"{url} is not of the form http://host:port")
        self.url = url
        self._host, self._port = parts.hostname, parts.port or 80
        self._idle: list[_Answer] = []
        self._busy: set[_Answer] = set()
        self.peak_busy = 0  # most requests that waited for their answers at once

    async def open(self, count: int) -> None:
        """Open `count` connections beforehand. Raises ServerGoneError."""
        self._idle += await asyncio.gather(*(self._connect() for _ in range(count)))

    async def ask(self, request: bytes, timeout_s: float) -> Stamped:
        """Send what `completion_request` made, and wait for the whole answer. Raises ServerGoneError only."""
        answer = self._take_idle() or await self._connect()
        self._busy.add(answer)
        self.peak_busy = max(self.peak_busy, len(self._busy))
        whole = answer.ask(request)
        try:
            async with asyncio.timeout(timeout_s):
                return await whole
        except TimeoutError:
            now_s = time.monotonic()
            return Stamped(now_s - timeout_s, None, now_s, None, f"no whole answer after {timeout_s:g} s")
        finally:
            self._busy.discard(answer)
            if whole.cancelled():  # by the timeout, or by whoever no longer wants it
                answer.close()
            elif answer.is_open:
                self._idle.append(answer)

    def completion_request(
        self, model: str, token_ids: Sequence[int], max_tokens: int, *, with_timeline: bool = False
    ) -> bytes:
        """A request whose answer has exactly `max_tokens` tokens, streamed, as bytes to be sent."""
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
        for answer in (*self._idle, *self._busy):
            answer.close()
        self._idle.clear()

    def _take_idle(self) -> _Answer | None:
        while self._idle:
            answer = self._idle.pop()  # the one used last: it is the least likely to have been closed
            if answer.is_open:
                return answer
        return None

    async def _connect(self) -> _Answer:
        try:
            _, answer = await asyncio.get_running_loop().create_connection(_Answer, self._host, self._port)
        except OSError as error:
            raise ServerGoneError(f"nothing answers at {self.url} ({error.strerror or error})") from error
        return answer

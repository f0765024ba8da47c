"""Reads a request's body from ASGI: never more than allowed, never forever, and only strict JSON."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from tandem.core.errors import InvalidRequestError, PayloadTooLargeError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

BODY_TIMEOUT_S = 30.0
_DRAIN_S = 5.0


class ClientGoneError(Exception):
    """The client closed the connection; there is nobody to answer."""


def header(headers: Headers, name: bytes) -> str:
    """A header's value, empty if it is not there. Names are in lower case, as ASGI gives them."""
    return next((value.decode("latin-1") for key, value in headers if key == name), "")


async def read_body(headers: Headers, receive: Receive, max_bytes: int) -> bytes:
    """Raises PayloadTooLargeError as soon as the body is known to be too large, InvalidRequestError if it does not
    come in time, ClientGoneError if it never will."""
    declared = header(headers, b"content-length")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                chunk = message.get("body", b"")
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise _too_large(max_bytes)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError as error:
        raise InvalidRequestError(f"The body did not arrive within {BODY_TIMEOUT_S:g} s.") from error


def _too_large(max_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The body is larger than the {max_bytes} bytes this server accepts.")


async def drain(receive: Receive) -> None:
    """Let a client that is still sending finish for a moment: a connection reset would lose it our answer."""
    try:
        async with asyncio.timeout(_DRAIN_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def parse_json(body: bytes) -> Any:
    """Strict JSON in UTF-8: no NaN, no Infinity, no halves of surrogate pairs. Raises InvalidRequestError."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        try:
            body.decode()
        except UnicodeDecodeError as bad:
            raise InvalidRequestError(f"The body is not valid UTF-8 (byte {bad.start}).") from bad
        raise InvalidRequestError(
            f"The body is not valid JSON: {error.msg.rsplit(':', 1)[0]} at line {error.lineno}, column {error.colno}."
        ) from error

"""Bodies of HTTP requests: within limits of size, structure and memory before anything is made of them."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import orjson
from starlette.requests import Request

from tandem.core.errors import InvalidRequestError, OverloadedError, PayloadTooLargeError, UnsupportedMediaTypeError
from tandem.core.router_section import RouterSection
from tandem.router.limits import MAX_MESSAGES, clipped

# Parsing a value costs about 0.1 us, an object or list up to 0.5 us: these limits keep the event loop free.
_MAX_CONTAINERS = 4 * MAX_MESSAGES
_MAX_KEYS = 16 * MAX_MESSAGES
_PIECE_BYTES = 64 << 10  # about 1 ms
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class BodyBudget:
    """Bytes that all running requests together may hold: their bodies, over HTTP and gRPC, and log-probabilities of
    responses over HTTP."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes

    def add(self, num_bytes: int) -> None:
        """Raises OverloadedError, and adds nothing, if they are too many."""
        if self.num_bytes + num_bytes > self._max_bytes:
            raise OverloadedError(
                f"Running requests hold the {self._max_bytes} bytes of bodies that fit; try again later."
            )
        self.num_bytes += num_bytes

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """For one request of a known size. Raises OverloadedError on entry."""
        held = HeldBody(self)
        held.add(num_bytes)
        try:
            yield
        finally:
            held.release()


class HeldBody:
    """The share of a budget that one request holds until `release`."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Raises OverloadedError."""
        self._budget.add(num_bytes)
        self._num_bytes += num_bytes

    def release(self) -> None:
        self._budget.num_bytes -= self._num_bytes
        self._num_bytes = 0


class _Structure:
    """Counts what a JSON body is made of while it arrives: lists and objects, keys, and items of both."""

    def __init__(self, max_items: int) -> None:
        self._max_items = max_items
        self._num_containers = self._num_keys = self._num_items = 0
        self._is_in_string = False
        self._rest = b""  # a backslash whose character comes with the next piece

    def read(self, piece: bytes) -> None:
        """Raises InvalidRequestError as soon as there are too many."""
        piece = self._rest + piece
        num_backslashes = len(piece) - len(piece.rstrip(b"\\"))
        self._rest = b"\\" if num_backslashes % 2 else b""
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[self._is_in_string :: 2])
        self._is_in_string ^= len(parts) % 2 == 0
        self._num_containers += outside.count(b"[") + outside.count(b"{")
        self._num_keys += outside.count(b":")
        self._num_items += outside.count(b",")
        for count, most, name in (
            (self._num_containers, _MAX_CONTAINERS, "lists and objects"),
            (self._num_keys, _MAX_KEYS, "keys"),
            (self._num_items, self._max_items, "items"),
        ):
            if count > most:
                raise InvalidRequestError(f"The body has more than {most} {name}.")


async def read_json(request: Request, settings: RouterSection, held: HeldBody) -> Any:
    """The JSON value of the body.

    Raises UnsupportedMediaTypeError for anything but plain JSON; PayloadTooLargeError, OverloadedError or
    InvalidRequestError as soon as it is known that the body exceeds a limit; InvalidRequestError; ClientDisconnect.
    """
    _check_type(request)
    declared = request.headers.get("content-length", "")
    _check_size(int(declared) if declared.isdecimal() else 0, settings.max_body)
    body = bytearray()
    structure = _Structure(settings.max_body_items)
    async with aclosing(request.stream()) as stream:
        async for chunk in stream:
            _check_size(len(body) + len(chunk), settings.max_body)
            held.add(len(chunk))
            body += chunk
            for start in range(0, len(chunk), _PIECE_BYTES):
                structure.read(chunk[start : start + _PIECE_BYTES])
                await asyncio.sleep(0)
    return _parse(body)


def _check_type(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        given = f"'{clipped(media_type)}'" if media_type else "not given"
        raise UnsupportedMediaTypeError(f"The content-type must be application/json, but it is {given}.")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise UnsupportedMediaTypeError(
            f"This server takes no compressed body, but the content-encoding is '{clipped(encoding)}'."
        )


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise PayloadTooLargeError(f"The body is larger than the {max_bytes} bytes this server accepts.")


def _parse(body: bytearray) -> Any:
    """Strict JSON in UTF-8: no NaN, no Infinity, no halves of surrogate pairs. Raises InvalidRequestError."""
    try:
        return orjson.loads(body.removeprefix(_BYTE_ORDER_MARK))
    except orjson.JSONDecodeError as error:
        try:
            body.decode()
        except UnicodeDecodeError as bad:
            raise InvalidRequestError(f"The body is not valid UTF-8 (byte {bad.start}).") from bad
        raise InvalidRequestError(
            f"The body is not valid JSON: {error.msg.rsplit(':', 1)[0]} at line {error.lineno}, column {error.colno}."
        ) from error

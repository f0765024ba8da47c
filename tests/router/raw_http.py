"""Bytes on a socket: what no HTTP client would send, and every response to it."""

import asyncio
import contextlib
import io
import json
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

from tests.router.front import MODEL, Front

CHAT = "/v1/chat/completions"
_INTERIM = b"HTTP/1.1 102 Processing\r\n\r\n"


@dataclass(frozen=True, slots=True)
class RawResponse:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        code = json.loads(self.body)["error"]["code"]
        assert isinstance(code, str)
        return code


class _Socket:
    def __init__(self, data: io.BytesIO) -> None:
        self._data = data

    def makefile(self, _: str) -> "_Unclosed":
        return _Unclosed(self._data)


class _Unclosed(io.BufferedReader):
    """The rest is the next response's."""

    def __init__(self, data: io.BytesIO) -> None:
        super().__init__(data, buffer_size=1)  # type: ignore[arg-type]

    def close(self) -> None:
        self.detach()


def parse_responses(data: bytes) -> list[RawResponse]:
    """All final responses, each with a whole body. Raises AssertionError for anything else."""
    rest = io.BytesIO(data.replace(_INTERIM, b""))
    responses = []
    while rest.tell() < len(rest.getbuffer()):
        response = HTTPResponse(_Socket(rest))  # type: ignore[arg-type]
        response.begin()
        assert response.chunked or response.length is not None
        body = response.read()
        headers = {name.lower(): value for name, value in response.getheaders()}
        responses.append(RawResponse(response.status, headers, body))
    return responses


async def connect(front: Front) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", int(front.url.rpartition(":")[2]))


async def exchange(front: Front, *parts: bytes, pause_s: float = 0.0, half_close: bool = False) -> bytes:
    """Send the parts, and return all that comes until the server closes. A reset counts as the end."""
    reader, writer = await connect(front)
    data = bytearray()

    async def receive() -> None:
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(1 << 16):
                data.extend(part)

    async with asyncio.timeout(20):
        receiver = asyncio.create_task(receive())
        with contextlib.suppress(ConnectionError, RuntimeError):  # uvloop's, for a write after a reset
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause_s)
            if half_close:
                writer.write_eof()
        await receiver
    writer.close()
    return bytes(data)


def request_bytes(
    body: dict[str, Any] | bytes = b"", path: str = CHAT, method: str = "POST", *, close: bool = True, **headers: str
) -> bytes:
    """A right request but for what is changed; `headers` have underscores for dashes, an empty value leaves one out."""
    content = body if isinstance(body, bytes) else json.dumps({"model": MODEL} | body).encode()
    named = {"host": "localhost", "content_type": "application/json", "content_length": str(len(content))}
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in (named | headers).items() if value]
    if close:
        lines.append("connection: close\r\n")
    return f"{method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + content

"""One gRPC call with any bytes, and what may be answered."""

import re
from contextlib import suppress

import grpc

from tandem.wire.channels import token_metadata

# No name of a Python class, no traceback, no address in memory, no path of a source file.
_INSIDES = re.compile(r"Traceback|<class|object at 0x|\w+Error\b|\.py\b|Unexpected")


async def call(
    channel: grpc.aio.Channel, method: str, requests: list[bytes], token: str | None = None, timeout_s: float = 20.0
) -> grpc.StatusCode:
    """Every method can be called as one with streams. Reads what comes, and checks that no message of an error shows
    our insides."""
    stream = channel.stream_stream(method)(iter(requests), timeout=timeout_s, metadata=token_metadata(token))
    with suppress(grpc.aio.AioRpcError):
        async for _ in stream:
            pass
    status, details = await stream.code(), await stream.details() or ""
    if status is not grpc.StatusCode.OK:
        assert details or method.startswith("/grpc.health."), f"{method} ended with {status} and no reason"
        assert not _INSIDES.search(details), details
        assert len(details) < 2000, details
    return status

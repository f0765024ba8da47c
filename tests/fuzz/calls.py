"""One gRPC call with any bytes, and what may be answered."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc

from tandem.wire.channels import token_metadata

# No name of a Python class, no traceback, no address in memory, no path of a source file.
_INSIDES = re.compile(r"Traceback|<class|object at 0x|\w+Error\b|\.py\b|Unexpected")


async def call(
    channel: grpc.aio.Channel,
    method: str,
    requests: list[bytes],
    token: str | None = None,
    timeout_s: float = 20.0,
    hold_s: float = 0.0,
    num_responses: int = 0,
) -> grpc.StatusCode:
    """Every method can be called as one with streams. Ends the stream of requests after `hold_s`, reads what comes, at
    least `num_responses`, and checks that no message of an error shows our insides."""

    async def send() -> AsyncIterator[bytes]:
        for request in requests:
            yield request
        await asyncio.sleep(hold_s)

    metadata = token_metadata(token)
    if len(requests) == 1 and not hold_s:  # sent with the call itself, which may be refused before it is read
        stream = channel.unary_stream(method)(requests[0], timeout=timeout_s, metadata=metadata)
    else:
        stream = channel.stream_stream(method)(send(), timeout=timeout_s, metadata=metadata)
    count = 0
    with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):  # the latter where a request could not be sent
        async for _ in stream:
            count += 1
    assert count >= num_responses
    status, details = await stream.code(), await stream.details() or ""
    if details == "Internal error from Core":  # of the client's library, which wrote to a call that had ended
        return grpc.StatusCode.CANCELLED
    assert status not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), details
    if status is not grpc.StatusCode.OK:
        assert details or method.startswith("/grpc.health."), f"{method} ended with {status} and no reason"
        assert not _INSIDES.search(details), details
        assert len(details) < 2000, details
    return status

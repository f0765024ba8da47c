"""gRPC channels with options that detect a dead or hung peer within seconds.

Measured with grpcio 1.85: without keepalive a partition is never noticed, and a stopped peer only after a minute
unless `ping_timeout_ms` is set too. The server permits pings this frequent (see `wire/server.py`).
"""

from collections.abc import Callable
from typing import Any

import grpc

MAX_MESSAGE_BYTES = 64 << 20
KEEPALIVE_MS = 2_000
TOKEN_KEY = "authorization"

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
)


def token_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata with the cluster token, for one call."""
    return ((TOKEN_KEY, f"Bearer {token}"),) if token else ()


def _with_token(details: grpc.aio.ClientCallDetails, token: str) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()), *token_metadata(token))
    return grpc.aio.ClientCallDetails(
        method=details.method,
        timeout=details.timeout,
        metadata=metadata,
        credentials=details.credentials,
        wait_for_ready=details.wait_for_ready,
    )


class _UnaryToken(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_with_token(client_call_details, self._token), request)


def open_channel(address: str, token: str | None = None) -> grpc.aio.Channel:
    """A channel to `host:port` that sends the cluster token with every unary call. Connects when first used.

    Streams need `token_metadata`: with an interceptor, a stream that is cut leaves a task behind.
    """
    interceptors = [_UnaryToken(token)] if token else []
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS, interceptors=interceptors)

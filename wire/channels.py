"""gRPC channels between processes of a cluster, with options that detect a dead or hung peer within seconds.

Measured with grpcio 1.85: without keepalive a partition is never noticed, and a stopped peer only after a minute
unless `ping_timeout_ms` is set too. The server permits pings this frequent (see `wire/server.py`). A client sends at
most one ping a second, whatever it is told.
"""

from collections.abc import Callable
from typing import Any, Self

import grpc

from tandem.client_tls import ClientTls
from tandem.core.file_watch import FileWatch
from tandem.core.tls import ClusterTls
from tandem.grpc_poller import keep_grpc_poller

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

_KV_ANSWER_MS = 800
_KV_CONNECT_MS = 1_500

KV_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = tuple(
    (
        dict(CHANNEL_OPTIONS)
        | {
            "grpc.keepalive_time_ms": 1_000,
            "grpc.keepalive_timeout_ms": _KV_ANSWER_MS,
            "grpc.http2.ping_timeout_ms": _KV_ANSWER_MS,
            "grpc.min_reconnect_backoff_ms": _KV_CONNECT_MS,  # and so long a connection may take; 20 s otherwise
        }
    ).items()
)
"""Of a channel on which requests wait for KV: a lost network is noticed within 1.8 s."""


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


def open_channel(
    address: str,
    token: str | None = None,
    tls: ClusterTls | None = None,
    channel_options: tuple[tuple[str, int], ...] = CHANNEL_OPTIONS,
) -> grpc.aio.Channel:
    """A channel to `host:port` that sends the cluster token with every unary call. Connects when first used.

    With `tls` the files are read now; raises ConfigError. Streams need `token_metadata`: with an interceptor, a stream
    that is cut leaves a task behind.
    """
    keep_grpc_poller()
    interceptors = [_UnaryToken(token)] if token else []
    if tls is None:
        return grpc.aio.insecure_channel(address, options=channel_options, interceptors=interceptors)
    files = ClientTls(tls.ca, tls.certificate, tls.key, tls.server_name)
    options = (*channel_options, *files.options())
    return grpc.aio.secure_channel(address, files.credentials(), options=options, interceptors=interceptors)


class LastingChannel:
    """A channel for longer than certificates last: it is opened anew when their files have changed, because gRPC keeps
    those with which it began. Close it after its last call."""

    def __init__(self, address: str, token: str | None = None, tls: ClusterTls | None = None) -> None:
        self._address = address
        self._token = token
        self._tls = tls
        self._watch = FileWatch(() if tls is None else (tls.certificate, tls.key, tls.ca))
        self._channel: grpc.aio.Channel | None = None

    async def get(self) -> grpc.aio.Channel:
        """No call may be in progress. Raises ConfigError as `open_channel`."""
        if self._channel is None or self._watch.has_changed():
            await self.close()
            self._channel = open_channel(self._address, self._token, self._tls)
        return self._channel

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self.close()

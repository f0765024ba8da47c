"""The gRPC servers of routers and instances: limits, cluster token, health service, exclusive ports."""

import hmac
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from tandem.core.access import AccessControl
from tandem.core.address import split_address
from tandem.core.errors import ConfigError
from tandem.grpc_poller import keep_grpc_poller
from tandem.wire.answer_errors import AnswerErrors, RequestReads
from tandem.wire.channels import KEEPALIVE_MS, MAX_MESSAGE_BYTES, TOKEN_KEY
from tandem.wire.inference import GENERATE, caller_of
from tandem.wire.server_tls import ServerTls

_MAX_CALLS = 8192  # in progress in one server; more are refused with RESOURCE_EXHAUSTED
_MAX_STREAMS = 8192  # of one connection; a gRPC client keeps more calls waiting, until earlier ones have ended
_MAX_CLIENT_STREAMS = 4096
_CLIENT_IDLE_MS = 600_000  # then a connection without calls is closed; clients open another one
_MAX_READS = 32  # requests of clients that arrive at one time
_READ_TIMEOUT_S = 30.0
_UNREAD_BYTES = 16 << 10
_ANY_NUMBER = 1 << 30

_OPTIONS = {
    "grpc.so_reuseport": 0,  # a second server on the port must fail, not share it
    "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
    "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.min_recv_ping_interval_without_data_ms": KEEPALIVE_MS // 2,
    "grpc.http2.max_ping_strikes": 0,
    "grpc.keepalive_time_ms": KEEPALIVE_MS,
    "grpc.keepalive_timeout_ms": KEEPALIVE_MS,
    "grpc.http2.ping_timeout_ms": KEEPALIVE_MS,
    "grpc.max_concurrent_streams": _MAX_STREAMS,
    "grpc.server_handshake_timeout_ms": 10_000,
    # Of more than 1,000 calls that have just arrived, gRPC would cancel some at random, and from 3,000 on all.
    "grpc.server.max_pending_requests": _ANY_NUMBER,
    "grpc.server.max_pending_requests_hard_limit": _ANY_NUMBER,
}

_HEALTH_PREFIX = "/grpc.health.v1.Health/"


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without the cluster token, except health checks."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_HEALTH_PREFIX):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        given = metadata.get(TOKEN_KEY, "")
        given_bytes = given.encode() if isinstance(given, str) else given
        if hmac.compare_digest(given_bytes, self._expected):
            return handler
        return _DENY


async def _deny(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this port needs the cluster token")


# For every kind of method: a method with a stream of requests is called before any message has arrived.
_DENY: "grpc.RpcMethodHandler[Any, Any]" = grpc.stream_stream_rpc_method_handler(_deny)


def build_server(token: str | None = None) -> tuple[grpc.aio.Server, health_aio.HealthServicer]:
    """A server for processes of this cluster, with its health service, NOT yet bound or started. Add servicers, then
    `bind`, then `start`. Its methods may raise TandemErrors, which become the call's status."""
    interceptors = [TokenInterceptor(token)] if token else []
    return _build((*interceptors, AnswerErrors(_MAX_CALLS)), _OPTIONS)


def build_public_server(
    max_message_bytes: int, access: AccessControl | None = None
) -> tuple[grpc.aio.Server, health_aio.HealthServicer]:
    """A server for clients. A larger request is refused with RESOURCE_EXHAUSTED. With `access`, every call but a health
    check is authenticated, and limits count completion requests, both before their message is read."""
    reads = RequestReads(_MAX_READS, _READ_TIMEOUT_S)
    options = {
        **_OPTIONS,
        "grpc.max_receive_message_length": max_message_bytes,
        "grpc.max_concurrent_streams": _MAX_CLIENT_STREAMS,
        "grpc.max_connection_idle_ms": _CLIENT_IDLE_MS,
        # What a call may send before it is read; by itself, gRPC raises this to megabytes for fast clients.
        "grpc.http2.lookahead_bytes": _UNREAD_BYTES,
        "grpc.http2.bdp_probe": 0,
    }
    enter = None if access is None else partial(_enter, access)
    return _build((AnswerErrors(_MAX_CALLS, reads, enter),), options)


@contextmanager
def _enter(access: AccessControl, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> Iterator[None]:
    if method.startswith(_HEALTH_PREFIX):
        yield
        return
    caller = caller_of(access, context)
    with access.admit(caller) if method == GENERATE else nullcontext():
        yield


def _build(
    interceptors: tuple[grpc.aio.ServerInterceptor, ...], options: dict[str, int]
) -> tuple[grpc.aio.Server, health_aio.HealthServicer]:
    keep_grpc_poller()
    server = grpc.aio.server(interceptors=interceptors, options=tuple(options.items()))
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    return server, health


def bind(server: grpc.aio.Server, address: str, tls: ServerTls | None = None) -> str:
    """Bind `host:port` (port 0: any free port) and return the address with the actual port. `tls` has been loaded.
    Raises ConfigError."""
    host, port = split_address(address)
    try:
        if tls is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, tls.grpc_credentials())
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: port in use, or not an address of this machine") from error
    if bound == 0 or (port and bound != port):
        raise ConfigError(f"cannot listen on {address}: port in use, or not an address of this machine")
    return f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"

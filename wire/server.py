"""The gRPC servers of routers and instances: limits, cluster token, health service, exclusive ports."""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from tandem.core.config import split_address
from tandem.core.errors import ConfigError
from tandem.wire.channels import KEEPALIVE_MS, MAX_MESSAGE_BYTES, TOKEN_KEY

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),
    ("grpc.max_concurrent_streams", 8192),
)

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
        return _deny_like(handler)


def _deny_like(handler: "grpc.RpcMethodHandler[Any, Any]") -> "grpc.RpcMethodHandler[Any, Any]":
    """A handler that refuses calls, of the same kind (unary or streaming) as `handler`, as gRPC requires."""

    async def deny_unary(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this port needs the cluster token")

    async def deny_stream(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this port needs the cluster token")
        yield  # makes this a generator, which gRPC requires of a streaming method

    make: Callable[..., grpc.RpcMethodHandler[Any, Any]]
    match handler.request_streaming, handler.response_streaming:
        case False, False:
            make = grpc.unary_unary_rpc_method_handler
        case False, True:
            make = grpc.unary_stream_rpc_method_handler
        case True, False:
            make = grpc.stream_unary_rpc_method_handler
        case _:
            make = grpc.stream_stream_rpc_method_handler
    return make(
        deny_stream if handler.response_streaming else deny_unary,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def build_server(token: str | None = None) -> tuple[grpc.aio.Server, health_aio.HealthServicer]:
    """A server with its health service, NOT yet bound or started. Add servicers, then `bind`, then `start`."""
    interceptors = [TokenInterceptor(token)] if token else []
    server = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    return server, health


def bind(server: grpc.aio.Server, address: str) -> str:
    """Bind `host:port` (port 0: any free port) and return the address with the actual port. Raises ConfigError."""
    host, port = split_address(address)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: port in use, or not an address of this machine") from error
    if bound == 0 or (port and bound != port):
        raise ConfigError(f"cannot listen on {address}: port in use, or not an address of this machine")
    return f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"

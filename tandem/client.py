"""Clients of a router's gRPC API. They need grpcio and protobuf, and of Tandem only `tandem.core`.

    with Client("127.0.0.1:8001") as client:
        print(client.generate(prompt="def read_json(path):", max_tokens=64, temperature=0).text)
        for delta in client.stream(messages=[{"role": "user", "content": "hello"}]):
            print(delta.text, end="", flush=True)

A router with API keys needs `Client(address, api_key=...)`, one with TLS `Client(address, tls=ClientTls(ca=...))`.

Every failure is one of `tandem.core.errors`: UnavailableError when no router answers, InvalidRequestError and its
subclasses for refused requests, DeadlineError when `timeout_s` has passed.
"""

import math
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from tandem.client_tls import ClientTls
from tandem.completion import Completion, Delta, GenerateOptions, ModelInfo, join_deltas
from tandem.core.errors import ConfigError, InvalidRequestError
from tandem.core.printable import is_header_text
from tandem.grpc_poller import keep_grpc_poller
from tandem.messages import delta_from_pb, request_to_pb
from tandem.rpc_errors import error_from_rpc
from tandem.v1 import inference_pb2, inference_pb2_grpc

# A router permits pings this frequent. Without all three options a hung router is noticed after a minute or never.
_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
DEFAULT_ADDRESS = "127.0.0.1:8001"


_LONGEST_S = 1e9  # that a clock of gRPC can count


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """Raises ConfigError. gRPC's own error would show the key."""
    if api_key is not None and not is_header_text(api_key):
        raise ConfigError("the API key has characters that no header can have")
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def _timeout_s(options: GenerateOptions) -> float | None:
    """Raises InvalidRequestError."""
    timeout_s = options.get("timeout_s")
    if timeout_s is None:
        return None
    if math.isnan(timeout_s):
        raise InvalidRequestError("timeout_s must be a number of seconds, not nan", param="timeout_s")
    return min(timeout_s, _LONGEST_S)


class Stream(Iterator[Delta]):
    """A running answer. The request is sent at once; `close`, or the end of its `with` block, cancels the rest."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __next__(self) -> Delta:
        try:
            return delta_from_pb(next(self._call))
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    def close(self) -> None:
        """Cancel the answer; the router frees its resources. Does nothing after the end."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Client:
    """A connection to one router, made when first used. Threads may share it."""

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, api_key: str | None = None, tls: ClientTls | None = None
    ) -> None:
        """Raises ConfigError for a key that no header can have, and with `tls` for files that cannot be read."""
        self._metadata = _metadata(api_key)
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, tls.credentials(), (*_CHANNEL_OPTIONS, *tls.options()))
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def generate(self, **options: Unpack[GenerateOptions]) -> Completion:
        """The complete answer to one prompt."""
        with self.stream(**options) as stream:
            return join_deltas(stream)

    def stream(self, **options: Unpack[GenerateOptions]) -> Stream:
        """The answer as it is generated, one message after the other."""
        return Stream(self._stub.Generate(request_to_pb(options), timeout=_timeout_s(options), metadata=self._metadata))

    def models(self, timeout_s: float = 10.0) -> tuple[ModelInfo, ...]:
        """The models that the router serves now."""
        try:
            response = self._stub.ListModels(
                inference_pb2.ListModelsRequest(), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        return tuple(ModelInfo(model.id, model.max_model_len) for model in response.models)

    def close(self) -> None:
        """Close the connection; running answers are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class AsyncStream(AsyncIterator[Delta]):
    """`Stream` for asyncio."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._messages = call.__aiter__()

    async def __anext__(self) -> Delta:
        try:
            return delta_from_pb(await self._messages.__anext__())
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    def close(self) -> None:
        """Cancel the answer; the router frees its resources. Does nothing after the end."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio. Make it inside the running event loop."""

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, api_key: str | None = None, tls: ClientTls | None = None
    ) -> None:
        """Raises ConfigError for a key that no header can have, and with `tls` for files that cannot be read."""
        keep_grpc_poller()
        self._metadata = _metadata(api_key)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, tls.credentials(), (*_CHANNEL_OPTIONS, *tls.options()))
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def generate(self, **options: Unpack[GenerateOptions]) -> Completion:
        """The complete answer to one prompt."""
        async with self.stream(**options) as stream:
            return join_deltas([delta async for delta in stream])

    def stream(self, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """The answer as it is generated, one message after the other."""
        return AsyncStream(
            self._stub.Generate(request_to_pb(options), timeout=_timeout_s(options), metadata=self._metadata)
        )

    async def models(self, timeout_s: float = 10.0) -> tuple[ModelInfo, ...]:
        """The models that the router serves now."""
        try:
            response = await self._stub.ListModels(
                inference_pb2.ListModelsRequest(), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        return tuple(ModelInfo(model.id, model.max_model_len) for model in response.models)

    async def close(self) -> None:
        """Close the connection; running answers are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

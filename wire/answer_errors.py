"""What every gRPC server of ours does around its methods: bounds the calls in progress, and answers every error.

gRPC answers an unreadable message, or an error that a method raises, with UNKNOWN and the name of a Python class.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext, suppress
from inspect import isasyncgenfunction
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from tandem.core.errors import InternalError, InvalidRequestError, OverloadedError, TandemError
from tandem.rpc_errors import CODE_KEY, PARAM_KEY, REFUSED_BECAUSE_KEY, RETRY_AFTER_KEY

_LOG = logging.getLogger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_STATUS_TIMEOUT_S = 5.0
_MAX_MESSAGE_CHARS = 1000


class _Unreadable:
    """Stands for a message that cannot be read. gRPC calls the reader where no status can be given."""


def _reader(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    def read(message: bytes) -> Any:
        try:
            return deserialize(message) if deserialize else message
        except DecodeError:
            return _Unreadable()

    return read


def _readable(request: Any) -> Any:
    """Raises InvalidRequestError for what `_reader` could not read."""
    if isinstance(request, _Unreadable):
        raise InvalidRequestError("The request is not a protobuf message of the type that this method takes.")
    return request


async def _all_readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _readable(request)


def _clipped(message: str) -> str:
    """Clients of gRPC refuse a status of more than some KiB, and get no reason then."""
    return message if len(message) <= _MAX_MESSAGE_CHARS else f"{message[:_MAX_MESSAGE_CHARS]}..."


async def _end_call(context: grpc.aio.ServicerContext[Any, Any], method: str, error: Exception) -> None:
    """With the status of the error; a client finds its other values in the trailing metadata."""
    if isinstance(error, grpc.aio.UsageError):
        _LOG.info("%s: the call ended while its response was written", method)
        return
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, grpc.aio.BaseError):
        raise _ended(method) from error
    if not isinstance(error, TandemError):
        _LOG.error("%s failed", method, exc_info=error)
        error = InternalError("The server failed to answer; its log has the reason.")
    metadata = [(CODE_KEY, error.code), (PARAM_KEY, error.param or "")]
    if isinstance(error, OverloadedError):
        metadata.append((RETRY_AFTER_KEY, f"{error.retry_after_s:.3f}"))
        metadata.append((REFUSED_BECAUSE_KEY, error.reason))
    with suppress(TimeoutError):  # a client that reads nothing does not get this far; then gRPC resets the stream
        async with asyncio.timeout(_STATUS_TIMEOUT_S):
            try:
                await context.abort(grpc.StatusCode[error.grpc_status], _clipped(error.message), tuple(metadata))
            except grpc.aio.BaseError as failure:
                if isinstance(failure, grpc.aio.AbortError):
                    raise
                raise _ended(method) from failure


def _ended(method: str) -> asyncio.CancelledError:
    """The client has ended the call, or its deadline has. gRPC is told as if it had cancelled the method in time."""
    _LOG.info("%s: the call ended before its status was written", method)
    return asyncio.CancelledError()


class RequestReads:
    """Bounds the memory of requests that arrive slowly. gRPC lets a client send as much of a message as was asked for;
    before its first read, a call holds a few KiB. So `max_reads` requests are read at a time."""

    def __init__(self, max_reads: int, timeout_s: float) -> None:
        self._turns = asyncio.Semaphore(max_reads)
        self._timeout_s = timeout_s

    async def read(self, requests: AsyncIterator[Any]) -> Any:
        """The request of a method that takes one. Raises InvalidRequestError if there is none in time."""
        try:
            async with asyncio.timeout(self._timeout_s), self._turns:
                return _readable(await anext(requests))
        except TimeoutError as error:
            raise InvalidRequestError(f"The request did not arrive within {self._timeout_s:g} s.") from error
        except StopAsyncIteration as error:
            raise InvalidRequestError("The call ended without a request.") from error


Enter = Callable[[str, "grpc.aio.ServicerContext[Any, Any]"], AbstractContextManager[None]]


class AnswerErrors(grpc.aio.ServerInterceptor):
    """A TandemError that a method raises becomes its status, an unreadable message INVALID_ARGUMENT, any other error
    INTERNAL; the call after `max_calls` others is refused with RESOURCE_EXHAUSTED. `reads` None: requests are read by
    gRPC, as fast as possible. `enter` gets the method and the call before its request is read; the call is refused with
    the TandemError that this raises, and else runs in the context that this gives."""

    def __init__(self, max_calls: int, reads: RequestReads | None = None, enter: Enter | None = None) -> None:
        self._max_calls = max_calls
        self._reads = reads
        self._enter = enter
        self._num_calls = 0
        self._handlers: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "Awaitable[Handler | None]"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        method = handler_call_details.method
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._handlers[method] = self._wrap(method, handler)
        return self._handlers[method]

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if self._num_calls >= self._max_calls:
            raise OverloadedError(f"This server has {self._max_calls} calls in progress; try again later.")
        self._num_calls += 1
        try:
            yield
        finally:
            self._num_calls -= 1

    def _wrap(self, method: str, handler: Handler) -> Handler:
        """With `reads`, the new handler takes a stream of requests in any case: on the wire, one request is the same
        as a stream of one, and gRPC then leaves the reading to the handler."""
        behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        reads = None if handler.request_streaming else self._reads
        enter = self._enter or (lambda method, context: nullcontext())

        async def convert(request: Any) -> Any:
            if handler.request_streaming:
                return _all_readable(request)
            return _readable(request) if reads is None else await reads.read(request)

        async def to_one(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            """For methods that return a response, and for those that write their responses to the context."""
            try:
                with self._counted(), enter(method, context):
                    response = await behaviour(await convert(request), context)
                    if reads is None or handler.response_streaming:
                        return response
                    await context.write(response)
            except Exception as error:  # noqa: BLE001 - every call is answered
                await _end_call(context, method, error)

        async def to_many(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            try:
                with self._counted(), enter(method, context):
                    async with aclosing(behaviour(await convert(request), context)) as responses:
                        async for response in responses:
                            yield response
            except Exception as error:  # noqa: BLE001
                await _end_call(context, method, error)

        make: Callable[..., Handler]
        match handler.request_streaming or reads is not None, handler.response_streaming or reads is not None:
            case False, False:
                make = grpc.unary_unary_rpc_method_handler
            case False, True:
                make = grpc.unary_stream_rpc_method_handler
            case True, False:
                make = grpc.stream_unary_rpc_method_handler
            case _:
                make = grpc.stream_stream_rpc_method_handler
        return make(
            to_many if isasyncgenfunction(behaviour) else to_one,
            request_deserializer=_reader(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

"""The router's end of a session with a worker, and the worker's end of one with a router.

Both ends send without waiting: values go into a queue, and one task writes them in order. A stream that breaks ends
the session on both sides.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc

from tandem.core.clock import Clock, SystemClock
from tandem.core.errors import CancelledError, InvalidRequestError, TandemError, UnavailableError
from tandem.core.session import DecodeCommand, DecodeEvent, PrefillCommand, PrefillEvent
from tandem.rpc_errors import error_from_rpc
from tandem.v1 import worker_pb2_grpc
from tandem.wire import session_messages as messages
from tandem.wire.channels import token_metadata
from tandem.wire.status import abort

Command = TypeVar("Command")
CommandIn = TypeVar("CommandIn", contravariant=True)
Event = TypeVar("Event")


class _Session(Generic[Command, Event]):
    """One open session, seen from the router."""

    def __init__(
        self,
        call: grpc.aio.StreamStreamCall[Any, Any],
        encode: Callable[[Command, float], Any],
        decode: Callable[[Any], Event],
        clock: Clock,
    ) -> None:
        self._call = call
        self._encode = encode
        self._decode = decode
        self._clock = clock
        self._outbox: asyncio.Queue[Command] = asyncio.Queue()
        self._closed = False
        self._writer = asyncio.create_task(self._write_commands(), name="session-writer")

    def send(self, command: Command) -> None:
        """Queue a command; never blocks. Raises UnavailableError once the session is closed."""
        if self._closed:
            raise UnavailableError("the worker is gone")
        self._outbox.put_nowait(command)

    async def events(self) -> AsyncIterator[Event]:
        """The worker's events in order. Raises UnavailableError when the worker is gone; ends after `close`."""
        try:
            async for message in self._call:
                yield self._decode(message)
            raise UnavailableError("the worker ended the session")
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(error_from_rpc(error).message) from error
        except asyncio.CancelledError:
            if not (self._closed and self._call.cancelled()):  # cancelled from outside, not by close()
                raise
        finally:
            self._closed = True

    async def close(self) -> None:
        """End the session: the worker drops every request of it."""
        self._closed = True
        self._writer.cancel()
        self._call.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)

    async def _write_commands(self) -> None:
        try:
            while True:
                command = await self._outbox.get()
                await self._call.write(self._encode(command, self._clock.now_s()))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            self._closed = True  # events() tells why


class PrefillSession(_Session[PrefillCommand, PrefillEvent]):
    @classmethod
    async def open(
        cls,
        channel: grpc.aio.Channel,
        clock: Clock | None = None,
        timeout_s: float = 5.0,
        token: str | None = None,
    ) -> Self:
        """Raises UnavailableError if the worker does not answer within `timeout_s`. `token`: the cluster's."""
        await _wait_ready(channel, timeout_s)
        call = worker_pb2_grpc.PrefillServiceStub(channel).Session(metadata=token_metadata(token))
        return cls(call, messages.prefill_command_to_pb, messages.prefill_event_from_pb, clock or SystemClock())


class DecodeSession(_Session[DecodeCommand, DecodeEvent]):
    @classmethod
    async def open(
        cls,
        channel: grpc.aio.Channel,
        clock: Clock | None = None,
        timeout_s: float = 5.0,
        token: str | None = None,
    ) -> Self:
        """Raises UnavailableError if the worker does not answer within `timeout_s`. `token`: the cluster's."""
        await _wait_ready(channel, timeout_s)
        call = worker_pb2_grpc.DecodeServiceStub(channel).Session(metadata=token_metadata(token))
        return cls(call, messages.decode_command_to_pb, messages.decode_event_from_pb, clock or SystemClock())


async def _wait_ready(channel: grpc.aio.Channel, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await channel.channel_ready()
    except TimeoutError as error:
        raise UnavailableError(f"the worker did not answer within {timeout_s:g} s") from error


# --- the worker's end ------------------------------------------------------------------------------------------------


class Outbox(Generic[Event]):
    """Events on their way to one router. Filled on the event loop's thread, emptied by the stream's task."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._closed = False

    def put(self, event: Event) -> None:
        if not self._closed:
            self._events.append(event)
            self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    async def drain(self) -> AsyncIterator[Event]:
        while True:
            while self._events:
                yield self._events.popleft()
            if self._closed:
                return
            self._wake.clear()
            await self._wake.wait()


class CommandHandler(Protocol[CommandIn, Event]):
    """A worker, as its session service sees it. All three are called on the event loop's thread and do not block."""

    def open_session(self, outbox: Outbox[Event]) -> int:
        """A router has connected; returns the number of its session."""
        ...

    def handle(self, session_id: int, command: CommandIn) -> None: ...

    def close_session(self, session_id: int) -> None:
        """The router is gone: drop all its requests."""
        ...


class _SessionServicer(Generic[Command, Event]):
    def __init__(
        self,
        handler: CommandHandler[Command, Event],
        decode: Callable[[Any, float], Command],
        encode: Callable[[Event], Any],
        clock: Clock,
    ) -> None:
        self._handler = handler
        self._decode = decode
        self._encode = encode
        self._clock = clock

    async def Session(self, request_iterator: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        outbox: Outbox[Event] = Outbox()
        session_id = self._handler.open_session(outbox)
        reader = asyncio.create_task(self._read_commands(session_id, request_iterator, outbox), name="session-reader")
        try:
            async for event in outbox.drain():
                await context.write(self._encode(event))
            if error := await reader:
                await abort(context, error)
        finally:
            reader.cancel()
            self._handler.close_session(session_id)

    async def _read_commands(
        self, session_id: int, request_iterator: AsyncIterator[Any], outbox: Outbox[Event]
    ) -> TandemError | None:
        try:
            async for message in request_iterator:
                self._handler.handle(session_id, self._decode(message, self._clock.now_s()))
        except InvalidRequestError as error:  # a router that speaks nonsense loses its session, not the worker
            return error
        finally:
            outbox.close()
        return CancelledError("the router ended the session")


class PrefillServicer(_SessionServicer[PrefillCommand, PrefillEvent], worker_pb2_grpc.PrefillServiceServicer):
    def __init__(self, handler: CommandHandler[PrefillCommand, PrefillEvent], clock: Clock) -> None:
        super().__init__(handler, messages.prefill_command_from_pb, messages.prefill_event_to_pb, clock)


class DecodeServicer(_SessionServicer[DecodeCommand, DecodeEvent], worker_pb2_grpc.DecodeServiceServicer):
    def __init__(self, handler: CommandHandler[DecodeCommand, DecodeEvent], clock: Clock) -> None:
        super().__init__(handler, messages.decode_command_from_pb, messages.decode_event_to_pb, clock)

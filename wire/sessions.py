"""The router's end of a session with an instance, and the instance's end of one with a router.

Both ends send without waiting: values go into a queue, and one task writes them in order. A stream that breaks ends
the session on both sides.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import grpc

from tandem.core.clock import Clock, SystemClock
from tandem.core.errors import CancelledError, InvalidRequestError, TandemError, UnavailableError
from tandem.core.session import PrefillFinished, Role, SessionCommand, SessionEvent
from tandem.core.tls import ClusterTls
from tandem.rpc_errors import error_from_rpc
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire import session_messages as messages
from tandem.wire.channels import open_channel, token_metadata
from tandem.wire.convert import role_from_pb, role_to_pb

_INLINE_SCORED_TOKENS = 256  # of a prompt; about 5 ms of conversion, more is done in a thread


@dataclass(frozen=True, slots=True)
class RoleChange:
    """A role for a running instance, and bounds of its steps; None: the role's own setting or default."""

    role: Role
    max_batch: int | None = None
    max_batch_tokens: int | None = None
    max_prefill_tokens: int | None = None


class InstanceSession:
    """One open session, seen from the router, on a channel of its own."""

    def __init__(self, channel: grpc.aio.Channel, call: grpc.aio.StreamStreamCall[Any, Any], clock: Clock) -> None:
        self._channel = channel
        self._call = call
        self._clock = clock
        self._outbox: asyncio.Queue[SessionCommand] = asyncio.Queue()
        self._closed = False
        self._write_error: Exception | None = None
        self._writer = asyncio.create_task(self._write_commands(), name="session-writer")

    @classmethod
    async def open(
        cls,
        address: str,
        clock: Clock | None = None,
        timeout_s: float = 5.0,
        token: str | None = None,
        tls: ClusterTls | None = None,
    ) -> Self:
        """Raises UnavailableError if the instance does not answer within `timeout_s`. `token` and `tls`: the
        cluster's."""
        channel = open_channel(address, tls=tls)
        try:
            async with asyncio.timeout(timeout_s):
                await channel.channel_ready()
        except BaseException as error:
            await channel.close()
            if isinstance(error, TimeoutError):
                raise UnavailableError(f"the instance did not answer within {timeout_s:g} s") from error
            raise
        call = worker_pb2_grpc.InstanceServiceStub(channel).Session(metadata=token_metadata(token))
        return cls(channel, call, clock or SystemClock())

    def send(self, command: SessionCommand) -> None:
        """Queue a command; never blocks. Raises UnavailableError once the session is closed."""
        if self._closed:
            raise UnavailableError("the instance is gone")
        self._outbox.put_nowait(command)

    async def events(self) -> AsyncIterator[SessionEvent]:
        """The instance's events in order. Raises UnavailableError when the instance is gone or a command could not be
        written, InvalidRequestError for an event that cannot be read; ends after `close`."""
        try:
            async for message in self._call:
                if len(message.finished.prompt_logprobs) > _INLINE_SCORED_TOKENS:
                    yield await asyncio.to_thread(messages.event_from_pb, message)
                else:
                    yield messages.event_from_pb(message)
            raise UnavailableError("the instance ended the session")
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(error_from_rpc(error).message) from error
        except asyncio.CancelledError:
            if self._write_error is not None:
                raise UnavailableError("a command could not be sent to the instance") from self._write_error
            if not (self._closed and self._call.cancelled()):  # cancelled from outside, not by close()
                raise
        finally:
            self._closed = True

    async def close(self) -> None:
        """End the session: the instance drops every request of it."""
        self._closed = True
        self._writer.cancel()
        self._call.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        await self._channel.close()

    async def _write_commands(self) -> None:
        """Its end, for whatever reason, is the session's end: commands must not queue up unseen."""
        try:
            while True:
                command = await self._outbox.get()
                await self._call.write(messages.command_to_pb(command, self._clock.now_s()))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            self._closed = True  # the stream is broken, and events() tells why
        except Exception as error:  # noqa: BLE001 - `events` raises it
            self._closed = True
            self._write_error = error
            self._call.cancel()


async def configure_instance(channel: grpc.aio.Channel, change: RoleChange, timeout_s: float = 5.0) -> str:
    """Give a running instance a role; returns the instance's id. Raises what the instance answers, UnavailableError if
    it cannot be reached."""
    request = worker_pb2.ConfigureRequest(
        role=role_to_pb(change.role),
        max_batch=change.max_batch,
        max_batch_tokens=change.max_batch_tokens,
        max_prefill_tokens=change.max_prefill_tokens,
    )
    try:
        response = await worker_pb2_grpc.InstanceServiceStub(channel).Configure(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    return str(response.instance_id)


async def set_routers(channel: grpc.aio.Channel, control_addresses: Sequence[str], timeout_s: float) -> None:
    """Replace the routers that a running instance reports to. Raises as `configure_instance`."""
    request = worker_pb2.SetRoutersRequest(control=control_addresses)
    try:
        await worker_pb2_grpc.InstanceServiceStub(channel).SetRouters(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


# --- the instance's end ----------------------------------------------------------------------------------------------


class Outbox:
    """Events on their way to one router. Filled on the event loop's thread, emptied by the stream's task."""

    def __init__(self) -> None:
        self._events: deque[SessionEvent] = deque()
        self._num_unwritten = 0
        self._wake = asyncio.Event()
        self._closed = False

    @property
    def is_empty(self) -> bool:
        """All events are written."""
        return self._num_unwritten == 0

    def put(self, event: SessionEvent) -> None:
        if not self._closed:
            self._events.append(event)
            self._num_unwritten += 1
            self._wake.set()

    def close(self) -> None:
        """What is in it is still written, and then the session ends."""
        self._closed = True
        self._wake.set()

    async def drain(self) -> AsyncIterator[SessionEvent]:
        """Each event counts as written when the next one is asked for."""
        while True:
            while self._events:
                yield self._events.popleft()
                self._num_unwritten -= 1
            if self._closed:
                return
            self._wake.clear()
            await self._wake.wait()


class CommandHandler(Protocol):
    """An instance, as its session service sees it. All are called on the event loop's thread and do not block."""

    def open_session(self, outbox: Outbox) -> int:
        """A router has connected; returns the number of its session."""
        ...

    def handle(self, session_id: int, command: SessionCommand) -> None: ...

    def close_session(self, session_id: int) -> None:
        """The router is gone: drop all its requests."""
        ...

    def configure(self, change: RoleChange) -> None:
        """Raises ConfigError for bounds that the instance cannot keep."""
        ...

    def set_routers(self, control_addresses: Sequence[str]) -> None:
        """Raises ConfigError for an empty list, and for what is not an address."""
        ...


class InstanceServicer(worker_pb2_grpc.InstanceServiceServicer):
    def __init__(self, handler: CommandHandler, clock: Clock, instance_id: str = "") -> None:
        self._handler = handler
        self._clock = clock
        self._instance_id = instance_id

    async def Session(self, request_iterator: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        outbox = Outbox()
        session_id = self._handler.open_session(outbox)
        reader = asyncio.create_task(self._read_commands(session_id, request_iterator, outbox), name="session-reader")
        try:
            async for event in outbox.drain():
                if isinstance(event, PrefillFinished) and len(event.prompt_logprobs or ()) > _INLINE_SCORED_TOKENS:
                    await context.write(await asyncio.to_thread(messages.event_to_pb, event))
                else:
                    await context.write(messages.event_to_pb(event))
            if reader.done() and (error := reader.result()):  # else the instance has closed the outbox
                raise error
        finally:
            reader.cancel()
            self._handler.close_session(session_id)

    async def Configure(
        self, request: worker_pb2.ConfigureRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.ConfigureResponse:
        def value(name: str) -> int | None:
            return int(getattr(request, name)) if request.HasField(name) else None

        self._handler.configure(
            RoleChange(
                role_from_pb(request.role),
                value("max_batch"),
                value("max_batch_tokens"),
                value("max_prefill_tokens"),
            )
        )
        return worker_pb2.ConfigureResponse(instance_id=self._instance_id)

    async def SetRouters(
        self, request: worker_pb2.SetRoutersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.SetRoutersResponse:
        if not request.control:
            raise InvalidRequestError("an instance that reports to no router would be lost; name one at least")
        self._handler.set_routers(request.control)
        return worker_pb2.SetRoutersResponse()

    async def _read_commands(
        self, session_id: int, request_iterator: AsyncIterator[Any], outbox: Outbox
    ) -> TandemError | None:
        try:
            async for message in request_iterator:
                self._handler.handle(session_id, messages.command_from_pb(message, self._clock.now_s()))
        except InvalidRequestError as error:  # ends that router's session; other sessions go on
            return error
        finally:
            outbox.close()
        return CancelledError("the router ended the session")

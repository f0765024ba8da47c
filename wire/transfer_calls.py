"""Calls on one gRPC stream: a decode instance's end, which asks, and a prefill instance's end, which answers.

Each call is a message with a number, and so is its answer. As a gRPC call of its own, with headers and a status, each
of them would take twice as long.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import grpc

from tandem.core.errors import (
    DeadlineError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    TandemError,
    error_from_code,
)
from tandem.v1 import transfer_pb2

_log = logging.getLogger(__name__)

MAX_CALLS = 4096  # that one stream may have without an answer


class CallStream:
    """The end that asks. `call` has just begun; the stream ends with it."""

    def __init__(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        self._call = call
        self._outbox: asyncio.Queue[transfer_pb2.TransferCall] = asyncio.Queue()
        self._waiting: dict[int, asyncio.Future[transfer_pb2.TransferAnswer]] = {}
        self._last_id = 0
        self._writing = asyncio.create_task(self._write(), name="kv-calls-write")
        self._reading = asyncio.create_task(self._read(), name="kv-calls-read")
        self._reading.add_done_callback(self._ended)  # a task that is cancelled before its first step runs no code

    @property
    def has_ended(self) -> bool:
        return self._reading.done()

    async def ask(self, call: transfer_pb2.TransferCall, timeout_s: float) -> transfer_pb2.TransferAnswer:
        """The answer. `call` gets its number here. Raises the error that was answered, DeadlineError after `timeout_s`,
        and AioRpcError or CancelledError when the stream ends first."""
        self._last_id += 1
        call.id, call.timeout_s = self._last_id, max(0.0, timeout_s)
        waiting: asyncio.Future[transfer_pb2.TransferAnswer] = asyncio.get_running_loop().create_future()
        self._waiting[call.id] = waiting
        self._outbox.put_nowait(call)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await waiting
        except TimeoutError as error:
            raise DeadlineError("the prefill worker did not answer in time") from error
        finally:
            if self._waiting.pop(call.id, None) is not None:  # not answered: nobody waits for it any more
                self._outbox.put_nowait(transfer_pb2.TransferCall(id=call.id, cancel=transfer_pb2.CancelCall()))
        if answer.HasField("error"):
            raise error_from_code(answer.error.code, answer.error.message, answer.error.param or None)
        return answer

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._outbox.get())
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            self._call.cancel()  # `_read` tells why

    async def _read(self) -> None:
        async for answer in self._call:
            if (waiting := self._waiting.pop(answer.id, None)) is not None and not waiting.done():
                waiting.set_result(answer)
        self._call.cancel()

    def _ended(self, reading: asyncio.Task[None]) -> None:
        self._writing.cancel()
        error = None if reading.cancelled() else reading.exception()
        for waiting in self._waiting.values():
            if not waiting.done():
                if error is None:
                    waiting.cancel()
                else:
                    waiting.set_exception(error)
                    waiting.exception()  # its caller may have gone
        self._waiting.clear()


async def answer_calls(
    calls: AsyncIterator[transfer_pb2.TransferCall],
    answer: Callable[[transfer_pb2.TransferCall], Awaitable[transfer_pb2.TransferAnswer]],
) -> AsyncGenerator[transfer_pb2.TransferAnswer]:
    """The end that answers: what `answer` returns, or the error that it raises, for each call that is not cancelled.

    Raises InvalidRequestError for a number in use, and OverloadedError for more than `MAX_CALLS` calls at once.
    """
    answers: asyncio.Queue[transfer_pb2.TransferAnswer | None] = asyncio.Queue()
    tasks: dict[int, asyncio.Task[None]] = {}

    async def run(call: transfer_pb2.TransferCall) -> None:
        try:
            if not 0.0 < call.timeout_s < math.inf:
                raise InvalidRequestError("the call needs a time-out")
            reply = await answer(call)
        except TandemError as error:
            reply = _error_answer(error)
        except Exception as error:  # noqa: BLE001 - every call is answered
            _log.error("%s failed", call.WhichOneof("call"), exc_info=error)
            reply = _error_answer(InternalError("The server failed to answer; its log has the reason."))
        reply.id = call.id
        answers.put_nowait(reply)

    async def read() -> None:
        async for call in calls:
            if call.WhichOneof("call") == "cancel":
                if (task := tasks.get(call.id)) is not None:
                    task.cancel()
                continue
            if call.id in tasks:
                raise InvalidRequestError("two calls of a stream have one number")
            if len(tasks) + answers.qsize() >= MAX_CALLS:
                raise OverloadedError(f"This stream has {MAX_CALLS} calls without an answer; try again later.")
            task = tasks[call.id] = asyncio.create_task(run(call), name="kv-call")
            task.add_done_callback(partial(forget, call.id))

    def forget(number: int, _: object) -> None:
        del tasks[number]

    reading = asyncio.create_task(read(), name="kv-calls")
    reading.add_done_callback(lambda _: answers.put_nowait(None))
    try:
        while (reply := await answers.get()) is not None:
            yield reply
        reading.result()
    finally:
        reading.cancel()
        for task in list(tasks.values()):
            task.cancel()


def _error_answer(error: TandemError) -> transfer_pb2.TransferAnswer:
    failed = transfer_pb2.CallError(code=error.code, message=error.message, param=error.param or "")
    return transfer_pb2.TransferAnswer(error=failed)

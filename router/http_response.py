"""Responses of the HTTP API: a JSON object, an error, or the response to a completion request as it is computed."""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, TypeVarTuple

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tandem.core.completion import OpenCompletion, TextDelta
from tandem.core.errors import (
    InternalError,
    OverloadedError,
    PayloadTooLargeError,
    TandemError,
    UnauthenticatedError,
)
from tandem.core.log_lines import about
from tandem.router.http_body import HeldBody
from tandem.router.openai.requests import ParsedRequest
from tandem.router.openai.responses import error_body, error_events
from tandem.router.request_context import RequestContext
from tandem.router.text_service import TextService

REFUSED_BECAUSE = "x-tandem-refused-because"
EXPLANATION = "x-tandem-explanation"

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_LOG = logging.getLogger(__name__)

_DRAIN_S = 5.0
_INLINE_LOGPROBS = 1000  # about 5 ms of work
_BYTES_PER_LOGPROB = 64  # in a response
_TOKENS_PER_LOGPROB = 16  # of a prompt that becomes text again, in equal time
_PIECE_BYTES = 64 << 10


def json_response(
    context: RequestContext, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
    headers = {"x-request-id": context.echoed_id, **(headers or {})}
    return Response(orjson.dumps(body), status, headers, "application/json")


def error_response(context: RequestContext, error: Exception, headers: Mapping[str, str] | None = None) -> Response:
    """An error in OpenAI's shape. Any error but a TandemError is logged, and the response does not show its reason."""
    error = _public_error(context, error)
    if isinstance(error, PayloadTooLargeError):
        return _EarlyResponse(json_response(context, error.http_status, error_body(error), {"connection": "close"}))
    if isinstance(error, UnauthenticatedError):
        headers = {"www-authenticate": "Bearer"}
    if error.retryable:
        wait_s = error.retry_after_s if isinstance(error, OverloadedError) else 1.0
        headers = {"retry-after": str(math.ceil(wait_s))}
        if isinstance(error, OverloadedError):
            headers[REFUSED_BECAUSE] = error.reason
    return json_response(context, error.http_status, error_body(error), headers)


def _public_error(context: RequestContext, error: Exception) -> TandemError:
    if isinstance(error, TandemError):
        return error
    _LOG.error("request %s failed", context.request_id, exc_info=error, extra=about(context.request_id))
    return InternalError("The server failed to answer; its log has the reason.")


class _EarlyResponse(Response):
    """Sends a response while the client still sends its body, and then closes the connection.

    The rest of the body is read and dropped for a moment first: a connection reset would lose the response.
    """

    def __init__(self, response: Response) -> None:
        super().__init__(response.body, response.status_code, dict(response.headers))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(_DRAIN_S):
                while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})


class CompletionResponse(Response):
    """Runs a request and sends its response, an error included. A client that disconnects cancels the request at once.

    A stream starts with its first token, so an error before the first token has a status of its own; a later error is
    an event. Starlette's StreamingResponse can do neither, and writes the status before the first token is known.
    """

    def __init__(self, service: TextService, parsed: ParsedRequest, context: RequestContext) -> None:
        self.background = None
        self._service = service
        self._parsed = parsed
        self._context = context
        self._is_started = False
        self._begun: set[int] = set()  # choices whose first delta was written

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(_raise_on_disconnect(receive))
                await self._respond(scope, receive, send)
                watcher.cancel()
        except* ClientDisconnect:
            request_id = self._context.request_id
            _LOG.info("request %s: the client disconnected", request_id, extra=about(request_id))

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with await self._service.open(self._parsed.request) as completion:
                self._parsed.writer.begin(completion.prompt_token_ids)
                if self._parsed.is_stream:
                    await self._stream(completion, send)
                else:
                    await self._send_response(completion, scope["tandem.held_body"], send)
        except Exception as error:  # noqa: BLE001 - every request gets a response
            if self._is_started:
                await _send_events(send, error_events(_public_error(self._context, error)), is_last=True)
            else:
                await error_response(self._context, error)(scope, receive, send)

    async def _send_response(self, completion: OpenCompletion, held: HeldBody, send: Send) -> None:
        writer, all_work = self._parsed.writer, 0
        async for delta in completion:
            num_logprobs, work = self._work(delta, completion)
            held.add(num_logprobs * _BYTES_PER_LOGPROB)
            await _run(writer.collect, delta, work=work)
            all_work += work
        body = await _run(writer.response, work=all_work)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            *self._request_headers(completion),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._is_started = True
        for start in range(0, len(body), _PIECE_BYTES):
            is_last = start + _PIECE_BYTES >= len(body)
            await send(
                {"type": "http.response.body", "body": body[start : start + _PIECE_BYTES], "more_body": not is_last}
            )

    async def _stream(self, completion: OpenCompletion, send: Send) -> None:
        write = self._parsed.writer.chunks
        async for delta in completion:
            _, work = self._work(delta, completion)
            if events := await _run(write, delta, work=work):
                if not self._is_started:
                    await self._start_stream(completion, send)
                for start in range(0, len(events), _PIECE_BYTES):
                    await _send_events(send, events[start : start + _PIECE_BYTES])
        if not self._is_started:
            await self._start_stream(completion, send)
        await _send_events(send, self._parsed.writer.last_events(), is_last=True)

    def _work(self, delta: TextDelta, completion: OpenCompletion) -> tuple[int, int]:
        """Number of log-probabilities in a delta, and of those that take as long to write as all of it. The first delta
        of a choice may have the prompt."""
        request = self._parsed.request
        of_token, of_prompt_token = request.sampling.logprobs, request.sampling.prompt_logprobs
        count = 0 if of_token is None else len(delta.tokens) * (1 + of_token)
        if delta.choice in self._begun:
            return count, count
        self._begun.add(delta.choice)
        num_prompt_tokens = len(completion.prompt_token_ids[delta.choice // request.n])
        count += 0 if of_prompt_token is None else num_prompt_tokens * (1 + of_prompt_token)
        return count, count + num_prompt_tokens // _TOKENS_PER_LOGPROB

    async def _start_stream(self, completion: OpenCompletion, send: Send) -> None:
        self._is_started = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            *self._request_headers(completion),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    def _request_headers(self, completion: OpenCompletion) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", self._context.echoed_id.encode())]
        if self._context.wants_explanation:
            headers.append((EXPLANATION.encode(), completion.explanation().encode()))
        return headers


async def _send_events(send: Send, events: bytes, *, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": events, "more_body": not is_last})


async def _run(write: Callable[[*Ts], T], *args: *Ts, work: int) -> T:
    """Much work is done in a thread: the event loop then gets the interpreter's lock every 5 ms."""
    return await asyncio.to_thread(write, *args) if work > _INLINE_LOGPROBS else write(*args)


async def _raise_on_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect

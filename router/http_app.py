"""The OpenAI-compatible HTTP API, as a plain ASGI application.

    POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/{id}   GET /health   GET /metrics

Every failure has OpenAI's error shape. A stream begins with its first token, so that what fails before it still has a
status of its own; what fails later is an `error` event before `[DONE]`. While a request runs, a second task waits for
the client to go away, and then the first is cancelled: whatever runs for it on workers is freed.

A request with the header `x-tandem-timeline: 1`, or with `"tandem": {"timeline": true}` in its body, gets its timeline
in `usage.tandem`; in a stream this brings the usage chunk too. `x-request-id` is echoed, or made up.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from random import Random
from typing import Any, Protocol

from tandem.core.clock import Clock
from tandem.core.config import RouterSection
from tandem.core.errors import InternalError, InvalidRequestError, ModelNotFoundError, TandemError
from tandem.router.completion import TextService
from tandem.router.http_body import ClientGoneError, Message, Receive, Send, header, parse_json, read_body
from tandem.router.http_exchange import Exchange
from tandem.router.limits import clipped
from tandem.router.openai.answering import answer
from tandem.router.openai.endpoints import Arrival, Plan, plan_chat, plan_completion
from tandem.router.tokenizer import TextTokenizer

_LOG = logging.getLogger(__name__)

_METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_ENDPOINTS = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/models": "GET",
    "/health": "GET",
    "/metrics": "GET",
}
_MODEL_PREFIX = "/v1/models/"
_MAX_ECHOED_ID_CHARS = 128


class NotFoundError(InvalidRequestError):
    code = "not_found"
    grpc_status = "NOT_FOUND"
    http_status = 404


class MethodNotAllowedError(InvalidRequestError):
    code = "method_not_allowed"
    grpc_status = "UNIMPLEMENTED"
    http_status = 405


class MetricsPage(Protocol):
    def render(self) -> bytes:
        """The page in Prometheus's text format, version 0.0.4."""
        ...


class HttpApp:
    """The ASGI application; serve it without lifespan and websockets.

    `random` makes request ids; `wall_time_s` the `created` times.
    """

    def __init__(
        self,
        *,
        service: TextService,
        tokenizer: TextTokenizer,
        settings: RouterSection,
        metrics: MetricsPage,
        clock: Clock,
        random: Random,
        wall_time_s: Callable[[], float] = time.time,
    ) -> None:
        self._service = service
        self._tokenizer = tokenizer
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._random = random
        self._wall_time_s = wall_time_s

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        received_s = self._clock.now_s()
        assert scope["type"] == "http", "served without lifespan and websockets"
        request_id = f"{self._random.getrandbits(96):024x}"
        echoed = header(scope["headers"], b"x-request-id")
        if not (0 < len(echoed) <= _MAX_ECHOED_ID_CHARS and echoed.isascii() and echoed.isprintable()):
            echoed = request_id
        exchange = Exchange(request_id, echoed.encode(), received_s, scope["headers"], receive, send)
        try:
            await self._route(scope["method"], scope["path"], exchange)
        except ClientGoneError:
            _LOG.info("request %s: the client went away", request_id)
        except TandemError as error:
            await exchange.fail(error)
        except Exception:  # noqa: BLE001 - the door: one broken request must not take others with it
            _LOG.exception("request %s failed", request_id)
            await exchange.fail(InternalError("The server failed to answer; its log has the reason."))

    async def _route(self, method: str, path: str, exchange: Exchange) -> None:
        wanted = "GET" if path.startswith(_MODEL_PREFIX) else _ENDPOINTS.get(path)
        if wanted is None:
            raise NotFoundError(f"There is no '{clipped(path)}' here; this server has {', '.join(_ENDPOINTS)}.")
        if method != wanted:
            wrong = MethodNotAllowedError(f"'{clipped(path)}' takes {wanted}, not {method}.")
            await exchange.fail(wrong, (b"allow", wanted.encode()))
            return
        match path:
            case "/v1/chat/completions":
                await self._generate(plan_chat, exchange)
            case "/v1/completions":
                await self._generate(plan_completion, exchange)
            case "/v1/models":
                await exchange.send_json(200, {"object": "list", "data": self._models()})
            case "/health":
                is_ready = self._service.models()[0].max_model_len is not None
                await exchange.send_json(200 if is_ready else 503, {"status": "ok" if is_ready else "no workers"})
            case "/metrics":
                await exchange.send_whole(200, self._metrics.render(), _METRICS_TYPE)
            case _:
                await exchange.send_json(200, self._model(path.removeprefix(_MODEL_PREFIX)))

    def _models(self) -> list[dict[str, Any]]:
        return [
            {"id": m.name, "object": "model", "created": 0, "owned_by": "tandem", "max_model_len": m.max_model_len}
            for m in self._service.models()
        ]

    def _model(self, name: str) -> dict[str, Any]:
        for model in self._models():
            if model["id"] == name:
                return model
        raise ModelNotFoundError(f"The model '{clipped(name)}' does not exist.", param="model")

    async def _generate(self, plan: Callable[[Any, Arrival], Plan], exchange: Exchange) -> None:
        try:
            body = parse_json(await read_body(exchange.headers, exchange.receive, self._settings.max_body))
            planned = plan(body, self._arrival(exchange))
        except TandemError as error:
            self._service.refused(error)
            raise
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(_wait_for_disconnect(exchange.receive))
                await answer(self._service, planned, exchange)
                watcher.cancel()
        except* ClientGoneError as gone:
            raise ClientGoneError from gone

    def _arrival(self, exchange: Exchange) -> Arrival:
        return Arrival(
            request_id=exchange.request_id,
            received_s=exchange.received_s,
            deadline_s=exchange.received_s + self._settings.request_timeout_s,
            created_s=int(self._wall_time_s()),
            wants_timeline=header(exchange.headers, b"x-tandem-timeline") in ("1", "true"),
            tokenizer=self._tokenizer,
        )


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGoneError

"""The OpenAI-compatible HTTP API: routes, contexts and bodies of requests, errors. For users: docs/http-api.md."""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from random import Random
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from tandem.core.access import AccessControl, Caller, OpenAccess
from tandem.core.clock import Clock
from tandem.core.completion import SamplingDefaults
from tandem.core.errors import InvalidRequestError, ModelNotFoundError, NotFoundError, TandemError
from tandem.core.log_lines import about
from tandem.core.router_section import RouterSection
from tandem.router.http_body import BodyBudget, HeldBody, read_json
from tandem.router.http_host import check_host
from tandem.router.http_response import EXPLANATION, REFUSED_BECAUSE, CompletionResponse, error_response, json_response
from tandem.router.limits import clipped
from tandem.router.openai.openapi import openapi_document
from tandem.router.openai.requests import ParsedRequest, parse_chat, parse_completion
from tandem.router.request_context import RequestContext
from tandem.router.request_headers import authorization, requested_slo, tenant
from tandem.router.text_service import TextService
from tandem.router.tokenizer import TextTokenizer
from tandem.router.ui.pages import Pages

_LOG = logging.getLogger(__name__)

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MAX_ECHOED_ID_CHARS = 128


class MethodNotAllowedError(InvalidRequestError):
    code = "method_not_allowed"
    grpc_status = "UNIMPLEMENTED"
    http_status = 405


class HttpApp:
    """The ASGI application; serve it without lifespan and websockets.

    `access` says who may use it. `bodies` is shared with another API, if there is one. `random` makes request ids,
    `wall_time_s` the `created` times, `render_metrics` the page of `/metrics`; `pages` are served beside the API.
    """

    def __init__(
        self,
        *,
        service: TextService,
        tokenizer: TextTokenizer,
        settings: RouterSection,
        render_metrics: Callable[[], bytes],
        clock: Clock,
        random: Random,
        access: AccessControl = OpenAccess(),
        bodies: BodyBudget | None = None,
        wall_time_s: Callable[[], float] = time.time,
        pages: Pages = Pages(),
    ) -> None:
        self._service = service
        self._tokenizer = tokenizer
        self._settings = settings
        self._render_metrics = render_metrics
        self._clock = clock
        self._random = random
        self._wall_time_s = wall_time_s
        self._access = access
        self._open_paths = {"/health", "/readyz", "/livez", *pages.open_paths}
        if settings.open_metrics:
            self._open_paths.add("/metrics")
        self._budget = bodies or BodyBudget(settings.max_bodies)
        self._routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._describe_model),
            Route("/health", self._health),
            Route("/readyz", self._health),
            Route("/livez", self._live),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
            *pages.routes,
        ]
        self._router = Router(self._routes, redirect_slashes=False)
        # Not a Starlette application: that raises an error again after its 500, and the server closes the connection.
        self._app: ASGIApp = ExceptionMiddleware(
            self._route,
            handlers={
                HTTPException: self._on_http_exception,
                ClientDisconnect: self._on_disconnect,
                Exception: self._on_error,
            },
        )
        if settings.cors_origins:
            self._app = CORSMiddleware(
                self._app,
                allow_origins=settings.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=("x-request-id", "retry-after", REFUSED_BECAUSE, EXPLANATION),
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # with an application in the scope, starlette raises HTTPException for 404 and 405
        scope["path"] = scope["path"].rstrip("/") or "/"
        scope["tandem.context"] = self._context(scope)
        scope["tandem.held_body"] = held = HeldBody(self._budget)
        with ExitStack() as resources:
            scope["tandem.resources"] = resources
            resources.callback(held.release)
            await self._app(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        check_host(hosts, scope["http_version"], self._settings)
        if scope["path"] not in self._open_paths:
            scope["tandem.caller"] = self._authenticate(Headers(scope=scope), scope["client"])
        await self._router(scope, receive, send)

    def _authenticate(self, headers: Headers, client: tuple[str, int] | None) -> Caller:
        """Raises UnauthenticatedError."""
        try:
            return self._access.authenticate(authorization(headers), "" if client is None else client[0])
        except TandemError as error:
            self._service.refused(error)
            raise

    def _context(self, scope: Scope) -> RequestContext:
        headers = dict(scope["headers"])
        received_s = self._clock.now_s()
        request_id = f"{self._random.getrandbits(96):024x}"
        echoed = headers.get(b"x-request-id", b"").decode("latin-1")
        is_echoed = 0 < len(echoed) <= _MAX_ECHOED_ID_CHARS and echoed.isascii() and echoed.isprintable()
        return RequestContext(
            request_id=request_id,
            echoed_id=echoed if is_echoed else request_id,
            received_s=received_s,
            deadline_s=received_s + self._settings.request_timeout_s,
            created_s=int(self._wall_time_s()),
            wants_timeline=headers.get(b"x-tandem-timeline") in (b"1", b"true"),
            wants_explanation=headers.get(b"x-tandem-explain") in (b"1", b"true"),
            trace=scope.get("tandem.trace"),
        )

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, parse_chat)

    async def _complete(self, request: Request) -> Response:
        return await self._generate(request, parse_completion)

    async def _generate(
        self, request: Request, parse: Callable[[Any, RequestContext, TextTokenizer, SamplingDefaults], ParsedRequest]
    ) -> Response:
        context, caller = _context_of(request), request.scope["tandem.caller"]
        try:
            context = replace(
                context,
                client=caller.client,
                tenant=caller.tenant_of(tenant(request.headers)),
                slo=requested_slo(request.headers),
            )
            request.scope["tandem.resources"].enter_context(self._access.admit(caller))
            body = await read_json(request, self._settings, request.scope["tandem.held_body"])
            parsed = parse(body, context, self._tokenizer, self._service.defaults)
        except TandemError as error:
            self._service.refused(error)
            raise
        return CompletionResponse(self._service, parsed, context)

    async def _list_models(self, request: Request) -> Response:
        return json_response(_context_of(request), 200, {"object": "list", "data": self._models()})

    async def _describe_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        for model in self._models():
            if model["id"] == name:
                return json_response(_context_of(request), 200, model)
        raise ModelNotFoundError(f"The model '{clipped(name)}' does not exist.", param="model")

    def _models(self) -> list[dict[str, Any]]:
        return [
            {"id": m.name, "object": "model", "created": 0, "owned_by": "tandem", "max_model_len": m.max_model_len}
            for m in self._service.models()
        ]

    async def _health(self, request: Request) -> Response:
        is_ready = self._service.models()[0].max_model_len is not None
        body = {"status": "ok" if is_ready else "no workers"}
        return json_response(_context_of(request), 200 if is_ready else 503, body)

    async def _live(self, request: Request) -> Response:
        return json_response(_context_of(request), 200, {"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        headers = {"x-request-id": _context_of(request).echoed_id}
        return Response(self._render_metrics(), headers=headers, media_type=_METRICS_TYPE)

    async def _openapi(self, request: Request) -> Response:
        return json_response(_context_of(request), 200, openapi_document())

    async def _on_http_exception(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = clipped(request.scope["path"])
        if error.status_code == 404:
            paths = ", ".join(route.path for route in self._routes if not route.param_convertors)
            return error_response(
                _context_of(request), NotFoundError(f"There is no '{path}' here; this server has {paths}.")
            )
        assert error.status_code == 405
        allowed = ", ".join(sorted(request.scope["route"].methods))
        if request.method == "OPTIONS":
            headers = {"allow": f"{allowed}, OPTIONS", "x-request-id": _context_of(request).echoed_id}
            return Response(status_code=204, headers=headers)
        return error_response(
            _context_of(request),
            MethodNotAllowedError(f"'{path}' takes {allowed}, not {request.method}."),
            {"allow": allowed},
        )

    async def _on_error(self, request: Request, error: Exception) -> Response:
        return error_response(_context_of(request), error)

    async def _on_disconnect(self, request: Request, error: Exception) -> Response:
        request_id = _context_of(request).request_id
        _LOG.info("request %s: the client disconnected", request_id, extra=about(request_id))
        return Response()  # nobody receives it


def _context_of(request: Request) -> RequestContext:
    context = request.scope["tandem.context"]
    assert isinstance(context, RequestContext)
    return context

"""An ASGI application around another one, which traces calls of the API."""

from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem.core.request_trace import Operation

if TYPE_CHECKING:
    from tandem.router.tracing import Tracer

_OPERATIONS: dict[str, Operation] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
}
_HEADERS = (b"traceparent", b"tracestate")


class TracedApi:
    """Requests for completions have a span; what they do inside gets `scope["tandem.trace"]`. The response has the
    header `traceresponse`, with the trace's id."""

    def __init__(self, app: ASGIApp, tracer: "Tracer") -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/")
        operation = _OPERATIONS.get(path) if scope["method"] == "POST" else None
        if operation is None:
            await self._app(scope, receive, send)
            return
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _HEADERS}
        attributes = {
            "http.request.method": "POST",
            "http.route": path,
            "url.path": path,
            "url.scheme": scope["scheme"],
            "network.protocol.version": scope["http_version"],
        }
        if scope["client"] is not None:
            attributes["client.address"] = scope["client"][0]
        span = self._tracer.begin(f"POST {path}", headers, operation, attributes)
        scope["tandem.trace"] = span.request
        status: int | None = None

        async def send_traced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                traceresponse = (b"traceresponse", span.traceresponse.encode())
                message = {**message, "headers": [*message["headers"], traceresponse]}
            await send(message)

        try:
            await self._app(scope, receive, send_traced)
        finally:
            if status is None:  # the client has disconnected before
                span.end({}, "cancelled")
            else:
                span.end({"http.response.status_code": status}, str(status) if status >= 500 else None)

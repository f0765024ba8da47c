"""The page /ui over HTTP: its files, which hold no data of the cluster, and the JSON that they read.

The page loads nothing from elsewhere and runs no script but its files: its Content-Security-Policy makes the browser
refuse the rest. What comes from requests or instances reaches the page as JSON only, and its scripts write it as text.

Where the router asks for API keys, the files are open to everybody, since a browser sends no key for them; the JSON is
for holders of keys. A key that is bound to a tenant gets the requests of that tenant only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from tandem.core.access import Caller
from tandem.core.errors import NotFoundError
from tandem.router.limits import clipped
from tandem.router.ui.cluster_view import ClusterView

_PAGE = "/ui"
_STATE = "/ui/state"
_REQUESTS = "/ui/requests"

_FILES = Path(__file__).with_name("static")
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-cache",
    }
)


@dataclass(frozen=True, slots=True)
class Pages:
    """Routes that are served beside the API. `open_paths` need no API key."""

    routes: tuple[Route, ...] = ()
    open_paths: frozenset[str] = frozenset()


def ui_pages(view: ClusterView) -> Pages:
    """Reads the page's files now."""
    files = {path.name: (path.read_bytes(), _MEDIA_TYPES[path.suffix]) for path in _FILES.iterdir()}

    async def page(request: Request) -> Response:
        if request.scope["raw_path"].endswith(b"/"):  # the page's relative addresses begin at its parent
            return RedirectResponse("../ui", 308, headers=_headers(request))
        return _file(request, "index.html")

    async def file(request: Request) -> Response:
        return _file(request, request.path_params["name"])

    async def state(request: Request) -> Response:
        return Response(view.state(), headers=_headers(request), media_type="application/json")

    async def requests(request: Request) -> Response:
        tenant, request_id = _visible_tenant(request), request.query_params.get("id")
        body = view.latest(tenant) if request_id is None else view.explain(request_id, tenant)
        return Response(body, headers=_headers(request), media_type="application/json")

    def _file(request: Request, name: str) -> Response:
        if name not in files:
            raise NotFoundError(f"The page /ui has no file '{clipped(name)}'.")
        content, media_type = files[name]
        return Response(content, headers=_headers(request) | {"content-type": media_type})

    routes = (
        Route(_PAGE, page),
        Route(_STATE, state),
        Route(_REQUESTS, requests),
        Route(f"{_PAGE}/{{name}}", file),
    )
    return Pages(routes, frozenset({_PAGE, *(f"{_PAGE}/{name}" for name in files)}))


def _visible_tenant(request: Request) -> str | None:
    """The only tenant whose requests the caller may see; None: all."""
    caller: Caller = request.scope["tandem.caller"]
    return None if caller.names_tenants else caller.tenant


def _headers(request: Request) -> dict[str, str]:
    return {**_HEADERS, "x-request-id": request.scope["tandem.context"].echoed_id}

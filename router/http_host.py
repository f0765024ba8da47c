"""Which names a client may have for this server.

A web page can give its own name the address 127.0.0.1 (DNS rebinding) and then reach a server that listens on its
reader's machine only, as if the server were the page's own. Its requests have the page's name in their Host header.
"""

import ipaddress
from collections.abc import Sequence

from tandem.core.address import is_loopback
from tandem.core.errors import ForbiddenHostError, InvalidRequestError
from tandem.core.router_section import RouterSection
from tandem.router.limits import clipped


def check_host(values: Sequence[bytes], http_version: str, settings: RouterSection) -> None:
    """`values` are those of the Host headers. Raises InvalidRequestError unless there is one, and ForbiddenHostError
    for a foreign name at a server that listens on loopback."""
    if len(values) != 1 and not (http_version == "1.0" and not values):
        raise InvalidRequestError(f"An HTTP/1.1 request has one Host header, but this one has {len(values)}.")
    if not values or not is_loopback(settings.http) or "*" in settings.allowed_hosts:
        return
    name = _name(values[0].decode("latin-1")).lower().rstrip(".")
    is_own = name == "localhost" or name.endswith(".localhost") or _is_ip(name)
    if not is_own and name not in {allowed.lower() for allowed in settings.allowed_hosts}:
        raise ForbiddenHostError(
            f"This server listens on its own machine only and does not know the host '{clipped(name)}'; "
            "router.allowed_hosts may name it."
        )


def _name(host: str) -> str:
    """Without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

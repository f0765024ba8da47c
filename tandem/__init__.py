"""The public API: `from tandem import Client`.

Its names are imported when first used: every server process imports `tandem.v1`, and none of them needs the client.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandem.client import AsyncClient, Client
    from tandem.client_tls import ClientTls

__all__ = ["AsyncClient", "Client", "ClientTls"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tandem' has no attribute '{name}'")
    from tandem import client, client_tls

    return getattr(client_tls if name == "ClientTls" else client, name)

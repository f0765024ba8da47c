"""Access to the public APIs: the interface between the two APIs and the router's API keys."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from tandem.core.errors import PermissionDeniedError


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request. Limits apply to each `client`, which is the API key, or without keys the address.
    `tenant` is the tenant of the key, empty without keys. With `names_tenants` a request may name another tenant."""

    client: str
    tenant: str = ""
    key: str = ""
    names_tenants: bool = True

    def tenant_of(self, requested: str) -> str:
        """The tenant of a request that names `requested` (empty: none). Raises PermissionDeniedError."""
        if not requested or requested == self.tenant:
            return self.tenant
        if not self.names_tenants:
            raise PermissionDeniedError(
                f"The API key '{self.key}' belongs to the tenant '{self.tenant}' and may not name another one.",
                param="tenant",
            )
        return requested


class AccessControl(Protocol):
    """Identifies callers and limits their requests."""

    def authenticate(self, authorization: str, address: str) -> Caller:
        """`authorization` is the header or metadata of that name, empty if there is none; `address` is the client's.
        Raises UnauthenticatedError."""
        ...

    def admit(self, caller: Caller) -> AbstractContextManager[None]:
        """Counts one completion request of the caller while the `with` block runs. Raises OverloadedError on entry."""
        ...


class OpenAccess:
    """An `AccessControl` for everybody: a client is its address."""

    def authenticate(self, authorization: str, address: str) -> Caller:
        return Caller(address)

    def admit(self, caller: Caller) -> AbstractContextManager[None]:
        return nullcontext()

"""Who may use the public APIs, and to whom a request counts: the interface between both APIs and the router's keys."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from tandem.core.errors import PermissionDeniedError


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request. `client` is what its limits count: the API key, or without keys the address. `tenant` is the
    key's, empty without keys; `names_tenants`: a request may name another one."""

    client: str
    tenant: str = ""
    key: str = ""
    names_tenants: bool = True

    def tenant_of(self, requested: str) -> str:
        """The tenant of a request that names `requested`, or none. Raises PermissionDeniedError."""
        if not requested or requested == self.tenant:
            return self.tenant
        if not self.names_tenants:
            raise PermissionDeniedError(
                f"The API key '{self.key}' belongs to the tenant '{self.tenant}' and may not name another one.",
                param="tenant",
            )
        return requested


class AccessControl(Protocol):
    def authenticate(self, authorization: str, address: str) -> Caller:
        """`authorization` is the header or metadata of that name, empty if there is none; `address` is the client's.
        Raises UnauthenticatedError."""
        ...

    def admit(self, caller: Caller) -> AbstractContextManager[None]:
        """Counts one completion request to its caller while the block runs. Raises OverloadedError on entry."""
        ...


class OpenAccess:
    """An `AccessControl` for everybody: a client is its address."""

    def authenticate(self, authorization: str, address: str) -> Caller:
        return Caller(address)

    def admit(self, caller: Caller) -> AbstractContextManager[None]:
        return nullcontext()

"""Every call of our gRPC services, and attempts to make it without the right certificate or token.

The calls are those of the descriptors: one that is added is tried, too, and a service that is added needs a port here.
"""

import pkgutil
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

import grpc

import tandem.v1
from tandem import ClientTls

_TIMEOUT_S = 10.0
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
HEALTH = "/grpc.health.v1.Health/Check"

SERVICES_OF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "public": ("InferenceService",),
        "control": ("FleetService",),
        "instance": ("InstanceService", "KvTransferService"),
        "controller": ("ControllerService",),
    }
)
"""By the kind of port."""


def all_services() -> dict[str, tuple[str, ...]]:
    """The methods of each service of `tandem.v1`; a method with a stream of requests ends with `*`."""
    modules = [import_module(f"tandem.v1.{found.name}") for found in pkgutil.iter_modules(tandem.v1.__path__)]
    return {
        service.name: tuple(
            f"/{service.full_name}/{method.name}{'*' if method.client_streaming else ''}" for method in service.methods
        )
        for module in modules
        if module.__name__.endswith("_pb2")
        for service in module.DESCRIPTOR.services_by_name.values()
    }


def methods_of(kind: str) -> tuple[str, ...]:
    services = all_services()
    assert {name for names in SERVICES_OF.values() for name in names} == services.keys(), "a service has no port here"
    own = tuple(method for name in SERVICES_OF[kind] for method in services[name])
    return (*own, f"{REFLECTION}*") if kind == "public" else own


@dataclass(frozen=True)
class Port:
    """`files` and `token` open it."""

    kind: str
    address: str
    files: ClientTls | None
    token: str

    async def try_everything(
        self,
        wrong_files: Iterable[ClientTls | None],
        wrong_tokens: Iterable[str],
        but: Collection[str] = (),
    ) -> None:
        """Asserts that each call is refused, unless certificate and token are right. The calls `but` are not made with
        the right ones. An authorization is tried with each token, with none, and in other forms of the right one."""
        methods = methods_of(self.kind)
        for files in wrong_files:
            for method in (methods[0], HEALTH):
                status = await self._status(method, files, f"Bearer {self.token}")
                assert status is grpc.StatusCode.UNAVAILABLE, f"{self.kind} {method} {files}"
        right = self.token
        forms = (None, "", right, f"Basic {right}", f"Bearer {right}x", f"Bearer {right[:-1]}", "Bearer ", "Bearer")
        async with _channel(self.address, self.files) as channel:
            for method in methods:
                for authorization in (*forms, *(f"Bearer {token}" for token in wrong_tokens)):
                    status = await _status(channel, method, authorization)
                    assert status is grpc.StatusCode.UNAUTHENTICATED, f"{self.kind} {method} {authorization}: {status}"
            for method in methods:
                if method.rstrip("*").rpartition("/")[2] not in but:
                    status = await _status(channel, method, f"Bearer {right}")
                    assert status not in REFUSED, f"{self.kind} {method}: {status}"
            assert await _status(channel, HEALTH, None) is grpc.StatusCode.OK, "health needs no token"

    async def _status(self, method: str, files: ClientTls | None, authorization: str) -> grpc.StatusCode:
        async with _channel(self.address, files) as channel:
            return await _status(channel, method, authorization)


REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE}


def _channel(address: str, files: ClientTls | None) -> grpc.aio.Channel:
    options = [("grpc.use_local_subchannel_pool", 1), *(files.options() if files else ())]
    if files is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, files.credentials(), options=options)


async def _status(channel: grpc.aio.Channel, method: str, authorization: str | None) -> grpc.StatusCode:
    """Of one call that sends an empty message, or no message where there may be many."""
    metadata = () if authorization is None else (("authorization", authorization),)
    call: Any
    if method.endswith("*"):
        call = channel.stream_stream(method[:-1])(_nothing(), metadata=metadata, timeout=_TIMEOUT_S)
    else:
        call = channel.unary_stream(method)(b"", metadata=metadata, timeout=_TIMEOUT_S)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def _nothing() -> AsyncIterator[bytes]:
    """A stream with a message may end with another status, if it is refused while the message is written."""
    return
    yield b""

"""Kubernetes' API, as far as the controller needs it: pods of its namespace, its own ConfigMap and its Deployment.

Objects are their JSON values: those of users and of newer servers may have fields that no library knows yet.
"""

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import httpx2
from lightkube import ApiError, AsyncClient
from lightkube.core.exceptions import ConfigError as NoClusterError
from lightkube.generic_resource import create_namespaced_resource

from tandem.core.errors import ConfigError, NotFoundError, PermissionDeniedError, UnavailableError
from tandem.deploy.kubernetes.instance_pod import Document

_POD = create_namespaced_resource("", "v1", "Pod", "pods")
_CONFIG_MAP = create_namespaced_resource("", "v1", "ConfigMap", "configmaps")
_DEPLOYMENT = create_namespaced_resource("apps", "v1", "Deployment", "deployments")
_CALL_S = 10.0
_WATCH_S = 30  # then the server ends a watch, and another one begins


class KubernetesApi:
    """All methods raise UnavailableError where the server does not answer, PermissionDeniedError where the service
    account may not do that, ConfigError where the object is refused, NotFoundError where it is not there."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @classmethod
    def connect(cls) -> "KubernetesApi":
        """As the service account of this pod, or by KUBECONFIG. Raises ConfigError where there is neither."""
        try:
            return cls(AsyncClient())
        except (NoClusterError, OSError, KeyError) as error:
            raise ConfigError(f"there is no Kubernetes here ({error}); `tandem controller` runs in a pod") from error

    async def close(self) -> None:
        await self._client.close()

    async def create_pod(self, pod: Document) -> Document:
        with _errors(f"pod {pod['metadata']['name']}"):
            return _value(await self._client.create(_POD.from_dict(pod)))

    async def delete_pod(self, name: str, grace_s: int) -> None:
        """SIGTERM, and SIGKILL after `grace_s`. No effect on a pod that is gone."""
        try:
            with _errors(f"pod {name}"):
                await self._client.delete(_POD, name, grace_period=grace_s)
        except NotFoundError:
            pass

    async def list_pods(self, labels: Mapping[str, str]) -> tuple[list[Document], str]:
        """All pods with these labels, and the version of this list, for `watch_pods`."""
        with _errors("pods"):
            found = self._client.list(_POD, labels=dict(labels))
            pods = [_value(pod) async for pod in found]
            return pods, found.resourceVersion

    async def watch_pods(self, labels: Mapping[str, str], version: str) -> AsyncGenerator[tuple[str, Document], None]:
        """Changes after `version`: ADDED, MODIFIED or DELETED, and the pod. Ends when the server no longer knows what
        has changed since then."""
        with _errors("pods"):
            changes = self._client.watch(_POD, labels=dict(labels), server_timeout=_WATCH_S, resource_version=version)
            try:
                async for kind, pod in changes:
                    yield kind, _value(pod)
            except ApiError as error:
                if error.status.code != HTTPStatus.GONE:
                    raise

    async def read_log(self, pod: str, num_past: int, *, follow: bool) -> AsyncGenerator[str, None]:
        """Lines of the log of a pod's only container."""
        timeout = httpx2.Timeout(_CALL_S, read=None)  # a process may be silent for long
        client = AsyncClient(self._client.config, timeout=timeout)
        try:
            with _errors(f"log of pod {pod}"):
                async for line in client.log(pod, follow=follow, tail_lines=num_past, newlines=False):
                    yield line
        finally:
            await client.close()

    async def read_config_map(self, name: str) -> Document:
        with _errors(f"ConfigMap {name}"):
            return _value(await self._client.get(_CONFIG_MAP, name))

    async def replace_config_map(self, config_map: Document) -> bool:
        """False if it has been changed since this one was read."""
        try:
            with _errors(f"ConfigMap {config_map['metadata']['name']}"):
                await self._client.replace(_CONFIG_MAP.from_dict(config_map))
        except _ConflictError:
            return False
        return True

    async def read_deployment(self, name: str) -> Document:
        with _errors(f"Deployment {name}"):
            return _value(await self._client.get(_DEPLOYMENT, name))


def _value(found: Any) -> Document:
    return dict(found)


class _ConflictError(UnavailableError):
    """The object has been changed meanwhile, or another one has its name."""


@contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        code, message = error.status.code, f"Kubernetes refuses {what}: {error.status.message}"
        match code:
            case HTTPStatus.NOT_FOUND:
                raise NotFoundError(message) from error
            case HTTPStatus.CONFLICT:
                raise _ConflictError(message) from error
            case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
                raise PermissionDeniedError(message) from error
            case HTTPStatus.BAD_REQUEST | HTTPStatus.UNPROCESSABLE_ENTITY:
                raise ConfigError(message) from error
        raise UnavailableError(message) from error
    except (httpx2.HTTPError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise UnavailableError(f"Kubernetes' API does not answer for {what} ({reason})") from error

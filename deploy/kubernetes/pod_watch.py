"""The cluster's pods, as Kubernetes tells of them.

list all --version--> follow changes --an error, or silence--> list all again
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping

from tandem.core.errors import TandemError
from tandem.deploy.kubernetes.api import KubernetesApi
from tandem.deploy.kubernetes.instance_pod import Document

log = logging.getLogger(__name__)

_SILENCE_S = 60.0  # a connection may be dead; a list costs little
_AGAIN_S = 1.0


class PodWatch:
    """`run` keeps the pods up to date; others read them and wait for changes."""

    def __init__(self, api: KubernetesApi, labels: Mapping[str, str]) -> None:
        self._api = api
        self._labels = labels
        self._pods: dict[str, Document] = {}
        self._put_since_list: set[str] = set()
        self._changed = asyncio.Event()
        self._has_listed = asyncio.Event()

    def get(self, name: str) -> Document | None:
        return self._pods.get(name)

    async def all(self) -> tuple[Document, ...]:
        """Once they are known."""
        await self._has_listed.wait()
        return tuple(self._pods.values())

    def put(self, pod: Document) -> None:
        """One that this process has just made: the watch may tell of it later only."""
        name = pod["metadata"]["name"]
        self._put_since_list.add(name)
        self._pods.setdefault(name, pod)

    async def wait_changed(self, at_most_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._changed.wait()

    async def run(self) -> None:
        """Until cancelled."""
        is_reachable = True
        while True:
            try:
                async for _ in self._list_and_follow():
                    if not is_reachable:
                        log.info("Kubernetes' API answers again")
                    is_reachable = True
                    self._tell()
            except TandemError as error:
                if is_reachable:
                    log.warning("the pods are not known for now: %s", error.message)
                is_reachable = False
                await asyncio.sleep(_AGAIN_S)

    async def _list_and_follow(self) -> AsyncIterator[None]:
        """Ends after silence. Raises as `KubernetesApi`."""
        self._put_since_list.clear()
        listed, version = await self._api.list_pods(self._labels)
        made = {name: self._pods[name] for name in self._put_since_list if name in self._pods}
        self._pods = made | {pod["metadata"]["name"]: pod for pod in listed}
        self._has_listed.set()
        yield
        changes = self._api.watch_pods(self._labels, version)
        try:
            while True:
                try:
                    async with asyncio.timeout(_SILENCE_S):
                        kind, pod = await anext(changes)
                except (TimeoutError, StopAsyncIteration):
                    return
                name = pod["metadata"]["name"]
                if kind == "DELETED":
                    self._pods.pop(name, None)
                else:
                    self._pods[name] = pod
                yield
        finally:
            with contextlib.suppress(TandemError):
                await changes.aclose()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

"""Starts instances as pods: a `Launcher` for Kubernetes.

    launch: create the pod -> scheduled, loaded, Ready -> the instance says its id, and gets its role
    the pod's container ends, the pod is deleted, or is not Ready for `NOT_READY_S` -> the process has ended

Kubernetes restarts no container of these pods (`restartPolicy: Never`): the controller replaces an instance as a whole.
Pods outlive this process; the next controller finds them by their labels.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable

from tandem.core.clock import Clock
from tandem.core.errors import NotFoundError, TandemError, UnavailableError
from tandem.deploy.kubernetes.api import KubernetesApi
from tandem.deploy.kubernetes.instance_pod import (
    PROCESS,
    Document,
    PodSettings,
    address_of,
    end_of,
    is_leaving,
    is_ready,
    make_pod,
    owner_of,
    reason_of_wait,
    spec_of,
)
from tandem.deploy.kubernetes.pod_watch import PodWatch
from tandem.deploy.running_process import ProcessEnd, ProcessInfo, RunningProcess
from tandem.deploy.topology import ProcessSpec

log = logging.getLogger(__name__)

NOT_READY_S = 60.0  # its node does not answer, or its probe fails; a hung step ends its process sooner
_LOOK_S = 5.0
_ASK_AGAIN_S = 0.5
_CLOSE_S = 15  # after the grace period of a process, to close sockets and free memory
_KILL_S = 1
_GONE_S = 30.0  # for a pod to disappear after its grace period; that of a node that is cut off may stay

Introduce = Callable[[ProcessSpec, str], Awaitable[str]]
"""Gives the instance at an address its role, and returns its id. Raises UnavailableError while it does not answer."""


class PodLauncher:
    """`token`: where pods find the cluster token, as their settings name it; `secret`: the token itself.
    `check_in_charge` returns if no other controller has taken this one's place."""

    def __init__(
        self,
        api: KubernetesApi,
        watch: PodWatch,
        settings: PodSettings,
        introduce: Introduce,
        check_in_charge: Callable[[], Awaitable[None]],
        clock: Clock,
        *,
        token: str | None,
        secret: str | None,
        load_timeout_s: float,
    ) -> None:
        self._api = api
        self._watch = watch
        self._settings = settings
        self._introduce = introduce
        self._check_in_charge = check_in_charge
        self._clock = clock
        self._token = token
        self._secret = secret
        self._load_timeout_s = load_timeout_s
        self._owner: Document | None = None
        self._left: dict[str, str] = {}  # process -> pod

    async def find_left_running(self) -> list[ProcessSpec]:
        """The processes of pods that an earlier controller has made; `launch` takes each back, also one that still
        loads. Other pods of the cluster are deleted."""
        found = []
        for pod in sorted(await self._watch.all(), key=lambda pod: str(pod["metadata"].get("creationTimestamp"))):
            if is_leaving(pod):
                continue
            name = pod["metadata"]["name"]
            try:
                spec = spec_of(pod, self._settings, self._secret)
            except (ValueError, KeyError, TypeError) as error:
                log.warning("the pod %s is deleted, since its settings cannot be read (%s)", name, error)
                spec = None
            if spec is None or spec.name in self._left or end_of(pod) is not None:
                await self._api.delete_pod(name, _CLOSE_S)
                continue
            self._left[spec.name] = name
            found.append(spec)
        return found

    async def launch(self, spec: ProcessSpec) -> RunningProcess:
        """Raises ConfigError for a pod that Kubernetes refuses, UnavailableError for one that was not ready within the
        time to load."""
        name = self._left.pop(spec.name, None)
        is_up = False
        try:
            async with asyncio.timeout(self._load_timeout_s):
                if name is None:
                    await self._check_in_charge()
                    pod = make_pod(spec, self._settings, self._token, await self._get_owner())
                    name = pod["metadata"]["name"]
                    self._watch.put(await self._api.create_pod(pod))
                pod = await self._wait_ready(name)
                instance_id = await self._ask_id(spec, address_of(pod))
                is_up = True
        except TimeoutError as error:
            late = None if name is None else self._watch.get(name)
            reason = "Kubernetes' API does not answer" if late is None else reason_of_wait(late)
            raise UnavailableError(f"{spec.name} was not ready within {self._load_timeout_s:g} s: {reason}") from error
        finally:
            if name is not None and not is_up:
                await asyncio.shield(delete_pod(self._api, name, _KILL_S))
        info = ProcessInfo(spec.name, spec.role, 0, address_of(pod), instance_id, f"kubectl logs {name}")
        return PodProcess(info, name, self._api, self._watch, self._clock)

    async def read_log(self, process: str, num_past: int, follow: bool) -> AsyncIterator[tuple[str, ...]]:
        """Of the process's newest pod. Raises NotFoundError, UnavailableError."""
        pods = [pod for pod in await self._watch.all() if pod["metadata"]["labels"].get(PROCESS) == process]
        if not pods:
            raise NotFoundError(f"{process} has no pod; the log of an earlier one is gone with it")
        newest = max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))
        async for line in self._api.read_log(newest["metadata"]["name"], num_past, follow=follow):
            yield (line,)

    async def _get_owner(self) -> Document:
        if self._owner is None:
            self._owner = owner_of(await self._api.read_deployment(self._settings.deployment))
        return self._owner

    async def _wait_ready(self, name: str) -> Document:
        while True:
            pod = self._watch.get(name)
            if pod is None or is_leaving(pod):
                raise UnavailableError(f"its pod {name} was deleted before it was ready")
            if (end := end_of(pod)) is not None:
                raise UnavailableError(end.reason)
            if is_ready(pod):
                return pod
            await self._watch.wait_changed(_LOOK_S)

    async def _ask_id(self, spec: ProcessSpec, address: str) -> str:
        while True:
            try:
                return await self._introduce(spec, address)
            except UnavailableError:
                await asyncio.sleep(_ASK_AGAIN_S)


class PodProcess:
    """Implements `deploy.controller.RunningProcess`."""

    def __init__(self, info: ProcessInfo, pod: str, api: KubernetesApi, watch: PodWatch, clock: Clock) -> None:
        self.info = info
        self._pod = pod
        self._api = api
        self._watch = watch
        self._clock = clock

    @property
    def is_draining(self) -> bool:
        pod = self._watch.get(self._pod)
        return pod is not None and is_leaving(pod)

    async def wait_closed(self) -> ProcessEnd:
        ready_s, left_s = self._clock.now_s(), None
        while True:
            pod, now_s = self._watch.get(self._pod), self._clock.now_s()
            if pod is None:
                return ProcessEnd(f"its pod {self._pod} was deleted", was_asked=True)
            if (end := end_of(pod)) is not None:
                return end
            if is_leaving(pod):
                left_s = now_s if left_s is None else left_s
                if now_s - left_s > pod["metadata"].get("deletionGracePeriodSeconds", 0) + _GONE_S:
                    return ProcessEnd(f"its pod {self._pod} was deleted, and its node does not answer", was_asked=True)
            elif is_ready(pod):
                ready_s = now_s
            elif now_s - ready_s > NOT_READY_S:
                reason = reason_of_wait(pod)
                return ProcessEnd(f"its pod {self._pod} has not been ready for {now_s - ready_s:.0f} s: {reason}")
            await self._watch.wait_changed(_LOOK_S)

    async def stop(self, grace_s: float) -> None:
        whole_s = math.ceil(grace_s) + _CLOSE_S
        await self._api.delete_pod(self._pod, whole_s)
        until_s = self._clock.now_s() + whole_s + _GONE_S
        while (pod := self._watch.get(self._pod)) is not None and end_of(pod) is None:
            if self._clock.now_s() > until_s:
                return
            await self._watch.wait_changed(_LOOK_S)

    async def kill(self) -> None:
        """On a node that does not answer, the pod ends when the node does so again: no other instance has its id."""
        await delete_pod(self._api, self._pod, _KILL_S)


async def delete_pod(api: KubernetesApi, name: str, grace_s: int) -> None:
    """Again and again until Kubernetes has heard it: nobody else remembers the pod."""
    while True:
        try:
            return await api.delete_pod(name, grace_s)
        except TandemError as error:
            log.warning("the pod %s cannot be deleted yet: %s", name, error.message)
            await asyncio.sleep(_LOOK_S)

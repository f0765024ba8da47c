"""An API server of Kubernetes with the objects of one namespace, as far as Tandem's controller uses it. It serves HTTP
on loopback, and is as strict as a real one, or stricter:

- Tokens are checked, and each request against the rules of a Role.
- What is created or replaced is held against the strict schema of its kind, and labels against their syntax.
- Versions: a list has one, watches begin after one, and a replacement of an older one is a conflict. What was compacted
  away is 410 for a watch.
- A deleted pod stays until its kubelet says that it has ended, with the time and the grace period in its metadata.

`kubelet` is told of each pod that is created, and of each that is to end. No cluster was at hand to compare it with:
its behaviour follows the API's documentation ("API Concepts", "Pod Lifecycle", "Using RBAC Authorization").
"""

import asyncio
import copy
import itertools
import json
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.deploy.kubernetes.manifests import KUBERNETES_VERSIONS, NAMESPACE, Document, mistakes_of

TOKEN = "token-of-the-service-account"
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_KINDS = {"pods": ("", "Pod"), "configmaps": ("", "ConfigMap"), "deployments": ("apps", "Deployment")}
_MOST_ANNOTATIONS_BYTES = 256 << 10


class Kubelet(Protocol):
    def created(self, pod: Document) -> None: ...

    def deleted(self, pod: Document, grace_s: int) -> None:
        """The pod is to end; the kubelet then calls `FakeKubernetes.remove`."""
        ...

    def log(self, name: str, num_past: int, *, follow: bool) -> AsyncIterator[bytes]: ...


class Idle:
    """Pods become ready at once, and end at once."""

    def __init__(self) -> None:
        self.kubernetes: FakeKubernetes | None = None
        self.makes_ready = True
        self.graces: list[tuple[str, int]] = []
        self.num_pods: list[int] = []
        """At the times of these ends."""

    def created(self, pod: Document) -> None:
        assert self.kubernetes is not None
        if self.makes_ready:
            self.kubernetes.make_ready(pod["metadata"]["name"])

    def deleted(self, pod: Document, grace_s: int) -> None:
        assert self.kubernetes is not None
        self.graces.append((pod["metadata"]["labels"]["tandem.serve/process"], grace_s))
        self.num_pods.append(self.kubernetes.num_pods())
        self.kubernetes.remove(pod["metadata"]["name"])

    async def log(self, name: str, num_past: int, *, follow: bool) -> AsyncIterator[bytes]:
        for number in range(num_past):
            yield f"{name} line {number}\n".encode()
        if follow:
            yield b"a later line\n"


class _RefusedError(Exception):
    def __init__(self, code: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.code = code


class FakeKubernetes:
    """`rules` are those of the Role of the only service account, `objects` are there from the beginning."""

    def __init__(self, kubelet: Kubelet, rules: list[Document], objects: list[Document]) -> None:
        self.asked: set[tuple[str, str]] = set()
        """(verb, resource) of all requests that were allowed."""
        self.is_away = False
        self.url = ""
        self._kubelet = kubelet
        self._rules = rules
        self._versions = itertools.count(100)
        self._objects: dict[tuple[str, str], Document] = {}
        self._history: list[tuple[int, str, Document]] = []
        self._oldest = 0
        self._changed = asyncio.Event()
        for each in objects:
            plural = next(plural for plural, (_, kind) in _KINDS.items() if kind == each["kind"])
            self._store(plural, copy.deepcopy(each), "ADDED")

    # --- what a test sees and does -----------------------------------------------------------------------------------

    def pods(self) -> dict[str, Document]:
        """By the name of their process, the newest last."""
        found = (each for (plural, _), each in self._objects.items() if plural == "pods")
        return {each["metadata"]["labels"]["tandem.serve/process"]: each for each in found}

    def num_pods(self) -> int:
        return sum(plural == "pods" for plural, _ in self._objects)

    def config_map(self, name: str) -> Document:
        return self._objects["configmaps", name]

    def set_status(self, name: str, **status: Any) -> None:
        pod = copy.deepcopy(self._objects["pods", name])
        pod["status"] = pod.get("status", {}) | status
        self._store("pods", pod, "MODIFIED")

    def make_ready(self, name: str, ip: str = "127.0.0.1") -> None:
        conditions = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}]
        self.set_status(name, phase="Running", podIP=ip, conditions=conditions)

    def make_unready(self, name: str) -> None:
        """As for a node that does not answer."""
        self.set_status(name, conditions=[{"type": "Ready", "status": "False"}])

    def end_container(self, name: str, status: int, message: str = "") -> None:
        terminated = {"exitCode": status, "reason": "Error" if status else "Completed", "message": message}
        states = [{"name": "worker", "state": {"terminated": terminated}}]
        self.set_status(name, phase="Failed" if status else "Succeeded", containerStatuses=states, conditions=[])

    def remove(self, name: str) -> None:
        if ("pods", name) in self._objects:
            self._store("pods", self._objects.pop(("pods", name)), "DELETED")

    def delete(self, name: str, grace_s: int | None = None) -> None:
        """As `kubectl delete pod` does."""
        pod = copy.deepcopy(self._objects["pods", name])
        grace_s = pod["spec"].get("terminationGracePeriodSeconds", 30) if grace_s is None else grace_s
        if grace_s == 0 or pod.get("status", {}).get("phase") in ("Failed", "Succeeded"):
            self.remove(name)
            return
        pod["metadata"] |= {"deletionTimestamp": _now(), "deletionGracePeriodSeconds": grace_s}
        self._store("pods", pod, "MODIFIED")
        self._kubelet.deleted(pod, grace_s)

    def compact(self) -> None:
        """Forget what has changed so far."""
        self._oldest = next(self._versions)
        self._history.clear()
        self._changed.set()

    # --- HTTP --------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        methods = ["GET", "POST", "PUT", "DELETE"]
        paths = (
            "/api/v1/namespaces/{namespace}/{plural}",
            "/apis/apps/v1/namespaces/{namespace}/{plural}",
        )
        tails = ("", "/{name}", "/{name}/log")
        routes = [Route(path + tail, self._answer, methods=methods) for path in paths for tail in tails]
        config = uvicorn.Config(
            Starlette(routes=routes), port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server._serve(), name="API of Kubernetes")  # `serve` would take the signals
        try:
            while not server.started:
                await asyncio.sleep(0.01)
                if serving.done():
                    serving.result()
            self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            yield
        finally:
            server.should_exit = True
            server.force_exit = True
            self._changed.set()
            with suppress(asyncio.CancelledError):
                await serving

    async def _answer(self, request: Request) -> Response:
        try:
            return await self._allowed(request)
        except _RefusedError as error:
            return JSONResponse(_status(error.code, str(error)), error.code)

    async def _allowed(self, request: Request) -> Response:
        plural, name = request.path_params["plural"], request.path_params.get("name", "")
        if self.is_away:
            raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is starting")
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise _RefusedError(HTTPStatus.UNAUTHORIZED, "Unauthorized")
        is_watch = request.query_params.get("watch") == "true"
        is_log = request.url.path.endswith("/log")
        verb = {"POST": "create", "PUT": "update", "DELETE": "delete"}.get(request.method, "get")
        if not name and request.method == "GET":
            verb = "watch" if is_watch else "list"
        group = "apps" if request.url.path.startswith("/apis/apps/") else ""
        resource = f"{plural}/log" if is_log else plural
        if request.path_params["namespace"] != NAMESPACE or not self._may(verb, group, resource, name):
            raise _RefusedError(HTTPStatus.FORBIDDEN, f'{resource} "{name}" is forbidden: cannot {verb} it')
        self.asked.add((verb, resource))
        match verb:
            case "list":
                found = [each for _, each in self._selected(plural, request)]
                metadata = {"resourceVersion": str(next(self._versions))}
                return JSONResponse({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": found})
            case "watch":
                return StreamingResponse(self._watch(plural, request), media_type="application/json")
            case "create":
                return JSONResponse(self._create(plural, await request.json()), HTTPStatus.CREATED)
        if (plural, name) not in self._objects:
            raise _RefusedError(HTTPStatus.NOT_FOUND, f'{plural} "{name}" not found')
        if is_log:
            wanted, follows = int(request.query_params["tailLines"]), request.query_params["follow"] == "true"
            return StreamingResponse(self._kubelet.log(name, wanted, follow=follows), media_type="text/plain")
        if verb == "update":
            return JSONResponse(self._replace(plural, name, await request.json()))
        if verb == "delete":
            grace = request.query_params.get("gracePeriodSeconds")
            self.delete(name, None if grace is None else int(grace))
            return JSONResponse({"kind": "Status", "apiVersion": "v1", "status": "Success"})
        return JSONResponse(self._objects[plural, name])

    def _may(self, verb: str, group: str, plural: str, name: str) -> bool:
        return any(
            group in rule["apiGroups"]
            and plural in rule["resources"]
            and verb in rule["verbs"]
            and ("resourceNames" not in rule or name in rule["resourceNames"])
            for rule in self._rules
        )

    def _selected(self, plural: str, request: Request) -> list[tuple[str, Document]]:
        return [(name, each) for (kind, name), each in self._objects.items() if kind == plural and _fits(each, request)]

    def _create(self, plural: str, document: Document) -> Document:
        name = document["metadata"]["name"]
        if (plural, name) in self._objects:
            raise _RefusedError(HTTPStatus.CONFLICT, f'{plural} "{name}" already exists')
        _check(document)
        document["metadata"] |= {"namespace": NAMESPACE, "uid": str(uuid.uuid4()), "creationTimestamp": _now()}
        stored = self._store(plural, document | {"status": {"phase": "Pending"}}, "ADDED")
        self._kubelet.created(stored)
        return stored

    def _replace(self, plural: str, name: str, document: Document) -> Document:
        _check(document)
        before = self._objects[plural, name]
        if document["metadata"].get("resourceVersion") != before["metadata"]["resourceVersion"]:
            raise _RefusedError(HTTPStatus.CONFLICT, f'"{name}": the object has been modified')
        return self._store(plural, document, "MODIFIED")

    def _store(self, plural: str, document: Document, change: str) -> Document:
        version = next(self._versions)
        document["metadata"]["resourceVersion"] = str(version)
        document["metadata"].setdefault("uid", str(uuid.uuid4()))
        if change != "DELETED":
            self._objects[plural, document["metadata"]["name"]] = document
        self._history.append((version, change, copy.deepcopy(document)))
        self._changed.set()
        self._changed = asyncio.Event()
        return document

    async def _watch(self, plural: str, request: Request) -> AsyncIterator[bytes]:
        kind = _KINDS[plural][1]
        version = int(request.query_params["resourceVersion"])
        with suppress(TimeoutError):
            async with asyncio.timeout(float(request.query_params["timeoutSeconds"])):
                while not self.is_away:
                    if version < self._oldest:
                        gone = _status(HTTPStatus.GONE, "too old resource version")
                        yield json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n"
                        return
                    changed = self._changed
                    for number, change, document in list(self._history):
                        if number > version and document["kind"] == kind and _fits(document, request):
                            yield json.dumps({"type": change, "object": document}).encode() + b"\n"
                        version = max(version, number)
                    await changed.wait()


def _check(document: Document) -> None:
    """What an API server checks, as far as a schema and a few rules say it."""
    mistakes = mistakes_of(document, KUBERNETES_VERSIONS[-1])
    metadata = document["metadata"]
    mistakes += [f"label {key}: {value}" for key, value in metadata.get("labels", {}).items() if not _is_label(value)]
    annotations = metadata.get("annotations", {})
    if sum(len(key) + len(value) for key, value in annotations.items()) > _MOST_ANNOTATIONS_BYTES:
        mistakes.append("the annotations are too long")
    if not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", metadata["name"]) or len(metadata["name"]) > 253:
        mistakes.append(f"the name {metadata['name']}")
    if mistakes:
        raise _RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(mistakes))


def _is_label(value: str) -> bool:
    return _LABEL.fullmatch(value) is not None


def _fits(document: Document, request: Request) -> bool:
    selector = request.query_params.get("labelSelector", "")
    wanted = dict(each.split("=", 1) for each in selector.split(",") if each)
    return wanted.items() <= document["metadata"].get("labels", {}).items()


def _status(code: HTTPStatus, message: str) -> Document:
    metadata: Document = {}
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": metadata,
        "status": "Failure",
        "message": message,
        "reason": code.phrase.replace(" ", ""),
        "code": int(code),
    }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

"""ControllerService: `tandem` commands and routers call the controller of a cluster."""

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import grpc

from tandem.core.cluster_status import ClusterChange, ClusterStatus, ProcessState, ProcessStatus
from tandem.rpc_errors import error_from_rpc
from tandem.v1 import controller_pb2, controller_pb2_grpc
from tandem.wire.channels import token_metadata

_STATE_TO_PB = {
    ProcessState.LOADING: controller_pb2.PROCESS_STATE_LOADING,
    ProcessState.UP: controller_pb2.PROCESS_STATE_UP,
    ProcessState.WAITING: controller_pb2.PROCESS_STATE_WAITING,
    ProcessState.STOPPING: controller_pb2.PROCESS_STATE_STOPPING,
    ProcessState.DRAINED: controller_pb2.PROCESS_STATE_DRAINED,
}
_STATE_FROM_PB = {value: key for key, value in _STATE_TO_PB.items()}
_SHORT_CALL_S = 5.0

Response = TypeVar("Response")


class ClusterHandler(Protocol):
    """What the calls do. A `grace_s` of None is the cluster's own. All raise TandemErrors."""

    async def apply(self, serve_file_json: str, grace_s: float | None, plan_json: str) -> ClusterChange: ...

    def status(self) -> ClusterStatus: ...

    async def scale(self, instances: Mapping[str, int], grace_s: float | None) -> ClusterChange: ...

    async def drain(self, process: str, grace_s: float | None, *, undo: bool) -> ClusterChange: ...

    async def set_role(self, process: str, role: str) -> None: ...

    async def stop(self, grace_s: float | None) -> None: ...

    def watch(self, num_past: int) -> AsyncIterator[str]:
        """The last lines, and all those after this call until the caller has enough."""
        ...

    def logs(self, process: str, num_past: int, *, follow: bool) -> AsyncIterator[Sequence[str]]:
        """The last lines of the log of a process, and with `follow` all later ones."""
        ...

    def router_announced(self, control: str) -> float:
        """Returns the seconds after which it is forgotten, unless it is announced again."""
        ...


class ControllerServicer(controller_pb2_grpc.ControllerServiceServicer):
    def __init__(self, handler: ClusterHandler) -> None:
        self._handler = handler

    async def Apply(
        self, request: controller_pb2.ApplyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> controller_pb2.ApplyResponse:
        return _change_to_pb(await self._handler.apply(request.serve_file_json, _grace_of(request), request.plan_json))

    async def Status(
        self, request: controller_pb2.StatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> controller_pb2.StatusResponse:
        status = self._handler.status()
        processes = [
            controller_pb2.ProcessStatus(
                name=process.name,
                role=process.role,
                state=_STATE_TO_PB[process.state],
                pid=process.pid,
                address=process.address,
                instance_id=process.instance_id,
                failures=process.failures,
                note=process.note,
            )
            for process in status.processes
        ]
        return controller_pb2.StatusResponse(model=status.model, processes=processes, routers=status.routers)

    async def Scale(
        self, request: controller_pb2.ScaleRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> controller_pb2.ApplyResponse:
        return _change_to_pb(await self._handler.scale(dict(request.instances), _grace_of(request)))

    async def Drain(
        self, request: controller_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> controller_pb2.ApplyResponse:
        change = await self._handler.drain(request.process, _grace_of(request), undo=request.undo)
        return _change_to_pb(change)

    async def SetRole(
        self, request: controller_pb2.SetRoleRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> controller_pb2.SetRoleResponse:
        await self._handler.set_role(request.process, request.role)
        return controller_pb2.SetRoleResponse()

    async def Stop(
        self, request: controller_pb2.StopRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> controller_pb2.StopResponse:
        await self._handler.stop(_grace_of(request))
        return controller_pb2.StopResponse()

    async def Watch(
        self, request: controller_pb2.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[controller_pb2.WatchResponse]:
        lines = self._handler.watch(max(0, request.num_past))
        await context.send_initial_metadata(())  # whoever waits for it misses no line
        async for line in lines:
            yield controller_pb2.WatchResponse(line=line)

    async def Logs(
        self, request: controller_pb2.LogsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[controller_pb2.LogsResponse]:
        async for lines in self._handler.logs(request.process, max(0, request.num_past), follow=request.follow):
            yield controller_pb2.LogsResponse(lines=lines)

    async def AnnounceRouter(
        self, request: controller_pb2.AnnounceRouterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> controller_pb2.AnnounceRouterResponse:
        return controller_pb2.AnnounceRouterResponse(again_s=self._handler.router_announced(request.control))


def _grace_of(request: Any) -> float | None:
    return float(request.grace_s) if request.HasField("grace_s") else None


def _change_to_pb(change: ClusterChange) -> controller_pb2.ApplyResponse:
    return controller_pb2.ApplyResponse(started=change.started, stopped=change.stopped, replaced=change.replaced)


# --- the client's end ------------------------------------------------------------------------------------------------


class ControllerClient:
    """Calls to a controller over `channel`, which has the cluster's token. All raise the controller's error, or
    UnavailableError when it cannot be reached. `timeout_s` bounds calls that wait for processes."""

    def __init__(self, channel: grpc.aio.Channel, timeout_s: float = 900.0) -> None:
        self._stub = controller_pb2_grpc.ControllerServiceStub(channel)
        self._timeout_s = timeout_s

    async def apply(self, serve_file_json: str, grace_s: float | None = None, plan_json: str = "") -> ClusterChange:
        request = controller_pb2.ApplyRequest(serve_file_json=serve_file_json, grace_s=grace_s, plan_json=plan_json)
        return _change_from_pb(await _answer(self._stub.Apply(request, timeout=self._timeout_s)))

    async def status(self) -> ClusterStatus:
        response = await _answer(self._stub.Status(controller_pb2.StatusRequest(), timeout=_SHORT_CALL_S))
        processes = tuple(
            ProcessStatus(
                process.name,
                process.role,
                _STATE_FROM_PB.get(process.state, ProcessState.LOADING),
                process.pid,
                process.address,
                process.instance_id,
                process.failures,
                process.note,
            )
            for process in response.processes
        )
        return ClusterStatus(response.model, processes, tuple(response.routers))

    async def scale(self, instances: Mapping[str, int], grace_s: float | None = None) -> ClusterChange:
        request = controller_pb2.ScaleRequest(instances=instances, grace_s=grace_s)
        return _change_from_pb(await _answer(self._stub.Scale(request, timeout=self._timeout_s)))

    async def drain(self, process: str, grace_s: float | None = None, *, undo: bool = False) -> ClusterChange:
        request = controller_pb2.DrainRequest(process=process, undo=undo, grace_s=grace_s)
        return _change_from_pb(await _answer(self._stub.Drain(request, timeout=self._timeout_s)))

    async def set_role(self, process: str, role: str) -> None:
        request = controller_pb2.SetRoleRequest(process=process, role=role)
        await _answer(self._stub.SetRole(request, timeout=self._timeout_s))

    async def stop(self, grace_s: float | None = None) -> None:
        await _answer(self._stub.Stop(controller_pb2.StopRequest(grace_s=grace_s), timeout=self._timeout_s))

    async def watch(self, token: str | None, num_past: int = 0) -> AsyncIterator[str]:
        """Returns the lines, once none can be missed. The `token` again: see `wire.channels.open_channel`."""
        request = controller_pb2.WatchRequest(num_past=num_past)
        call = self._stub.Watch(request, metadata=token_metadata(token))
        await call.initial_metadata()
        return _lines(call)

    def logs(self, token: str | None, process: str, num_past: int, *, follow: bool) -> AsyncIterator[Sequence[str]]:
        """Lines of the log of a process. The `token` as for `watch`."""
        request = controller_pb2.LogsRequest(process=process, num_past=num_past, follow=follow)
        timeout_s = None if follow else self._timeout_s
        return _log_lines(self._stub.Logs(request, metadata=token_metadata(token), timeout=timeout_s))

    async def announce_router(self, control: str) -> float:
        """Returns the seconds after which it must be announced again."""
        request = controller_pb2.AnnounceRouterRequest(control=control)
        response = await _answer(self._stub.AnnounceRouter(request, timeout=_SHORT_CALL_S))
        return float(response.again_s)


async def _answer(call: Awaitable[Response]) -> Response:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


async def _lines(call: Any) -> AsyncIterator[str]:
    try:
        async for response in call:
            yield response.line
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


async def _log_lines(call: Any) -> AsyncIterator[Sequence[str]]:
    try:
        async for response in call:
            yield tuple(response.lines)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


def _change_from_pb(response: controller_pb2.ApplyResponse) -> ClusterChange:
    return ClusterChange(tuple(response.started), tuple(response.stopped), tuple(response.replaced))

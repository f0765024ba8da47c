"""FleetService: instances report to a router; `tandem status` and `tandem serve` call it."""

from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from tandem.core.replanning import ReplanStatus
from tandem.core.session import InstanceStatus
from tandem.core.workload_profile import ProfileSnapshot
from tandem.rpc_errors import error_from_rpc
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire import convert, replanning
from tandem.wire.same_fields import from_message, to_message


@dataclass(frozen=True, slots=True)
class FleetDescription:
    """One router, its instances and its requests. `profile` is None unless requested and a window has closed; `replan`
    is None unless `tandem serve` watches a plan."""

    model: str
    uptime_s: float
    instances: tuple[InstanceStatus, ...]
    running_requests: int
    queued_requests: int
    replan: ReplanStatus | None = None
    profile: ProfileSnapshot | None = None


class Registry(Protocol):
    """The router's list of live instances."""

    def heartbeat(self, status: InstanceStatus) -> None:
        """Raises a TandemError for an instance that this router cannot use; the instance logs it and reports again."""
        ...

    def describe(self) -> FleetDescription:
        """Without the profile."""
        ...

    def profile(self) -> ProfileSnapshot | None: ...

    def explain(self, request_id: str) -> str:
        """For a person; of an empty id, the last requests. Raises NotFoundError for a request that is not known."""
        ...

    def replan_reported(self, status: ReplanStatus) -> None: ...

    def plan_reported(self, plan_json: str) -> None:
        """Empty: the cluster serves no plan. Raises InvalidRequestError for what is no plan."""
        ...


class FleetServicer(worker_pb2_grpc.FleetServiceServicer):
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def Heartbeat(
        self, request: worker_pb2.HeartbeatRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.HeartbeatResponse:
        self._registry.heartbeat(convert.status_from_pb(request.status))
        return worker_pb2.HeartbeatResponse()

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DescribeResponse:
        description = self._registry.describe()
        response = worker_pb2.DescribeResponse(
            model=description.model,
            uptime_s=description.uptime_s,
            instances=[convert.status_to_pb(status) for status in description.instances],
            running_requests=description.running_requests,
            queued_requests=description.queued_requests,
        )
        if description.replan is not None:
            response.replan.CopyFrom(replanning.replan_to_pb(description.replan))
        if request.with_profile and (profile := self._registry.profile()) is not None:
            response.profile.CopyFrom(to_message(worker_pb2.WorkloadProfile, profile))
        return response

    async def Explain(
        self, request: worker_pb2.ExplainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.ExplainResponse:
        return worker_pb2.ExplainResponse(text=self._registry.explain(request.request_id))

    async def ReportReplan(
        self, request: worker_pb2.ReportReplanRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.ReportReplanResponse:
        self._registry.replan_reported(replanning.replan_from_pb(request.status))
        return worker_pb2.ReportReplanResponse()

    async def ReportPlan(
        self, request: worker_pb2.ReportPlanRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.ReportPlanResponse:
        self._registry.plan_reported(request.plan_json)
        return worker_pb2.ReportPlanResponse()


async def send_heartbeat(channel: grpc.aio.Channel, status: InstanceStatus, timeout_s: float) -> None:
    """Report once. Raises the router's error, or UnavailableError when it cannot be reached."""
    request = worker_pb2.HeartbeatRequest(status=convert.status_to_pb(status))
    try:
        await worker_pb2_grpc.FleetServiceStub(channel).Heartbeat(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


async def report_replan(channel: grpc.aio.Channel, status: ReplanStatus, timeout_s: float) -> None:
    """Report the state of replanning to a router. Raises as `send_heartbeat`."""
    request = worker_pb2.ReportReplanRequest(status=replanning.replan_to_pb(status))
    try:
        await worker_pb2_grpc.FleetServiceStub(channel).ReportReplan(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


async def report_plan(channel: grpc.aio.Channel, plan_json: str, timeout_s: float) -> None:
    """Tell a router which plan the cluster serves; empty: none. Raises as `send_heartbeat`."""
    request = worker_pb2.ReportPlanRequest(plan_json=plan_json)
    try:
        await worker_pb2_grpc.FleetServiceStub(channel).ReportPlan(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


async def describe_fleet(
    channel: grpc.aio.Channel, timeout_s: float, *, with_profile: bool = False
) -> FleetDescription:
    """A router's description. Raises as `send_heartbeat`."""
    request = worker_pb2.DescribeRequest(with_profile=with_profile)
    try:
        response = await worker_pb2_grpc.FleetServiceStub(channel).Describe(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    return FleetDescription(
        model=response.model,
        uptime_s=response.uptime_s,
        instances=tuple(convert.status_from_pb(status) for status in response.instances),
        running_requests=response.running_requests,
        queued_requests=response.queued_requests,
        replan=replanning.replan_from_pb(response.replan) if response.HasField("replan") else None,
        profile=from_message(ProfileSnapshot, response.profile) if response.HasField("profile") else None,
    )


async def explain_request(channel: grpc.aio.Channel, request_id: str, timeout_s: float) -> str:
    """What a router says of one request, or of an empty id, of the last ones. Raises as `send_heartbeat`."""
    request = worker_pb2.ExplainRequest(request_id=request_id)
    try:
        response = await worker_pb2_grpc.FleetServiceStub(channel).Explain(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    return str(response.text)

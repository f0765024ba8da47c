"""The client's side of the standard gRPC health service."""

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


async def check_health(channel: grpc.aio.Channel, timeout_s: float) -> bool | None:
    """Whether the process says that it serves; None if it does not answer within `timeout_s`."""
    try:
        response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError:
        return None
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

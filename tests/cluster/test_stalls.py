"""Instances that are there and make no progress: a step that hangs, a process that is stopped."""

import asyncio
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.core.session import Role
from tandem.wire.channels import open_channel
from tests.cluster.harness import Cluster, running_cluster


def _is_serving(address: str) -> bool:
    async def ask() -> bool:
        async with open_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return asyncio.run(ask())

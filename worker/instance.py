"""What an instance shows to the outside: its gRPC server, its health, its heartbeats."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

from tandem.core.config import WorkerConfig
from tandem.core.session import BlockCounts, InstanceState, InstanceStatus, LinkStats, Role
from tandem.wire.server import bind, build_server
from tandem.worker.heartbeat import Heartbeat

REPORT_EVERY_S = 0.1  # between two reports of a busy loop: counting blocks by owner takes time


@dataclass(frozen=True, slots=True)
class LoopReport:
    """What the loop thread last said of itself; replaced whole, never changed."""

    fingerprint: str
    max_model_len: int
    block_size: int
    blocks: BlockCounts
    waiting_requests: int = 0
    running_requests: int = 0
    waiting_tokens: int = 0
    steps: int = 0
    step_s: float = 0.0
    computed_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0


class Instance:
    """One instance's public side. `listen` binds and registers, `ready` and `draining` change the state it reports."""

    def __init__(self, config: WorkerConfig, role: Role, instance_id: str) -> None:
        self._config = config
        self._role = role
        self._instance_id = instance_id
        self._state = InstanceState.LOADING
        self._server: grpc.aio.Server | None = None
        self._health: health_aio.HealthServicer | None = None
        self._report: Callable[[], LoopReport] | None = None
        self._links: Callable[[], tuple[LinkStats, ...]] = tuple
        self._heartbeat: Heartbeat | None = None
        self._heartbeat_task: asyncio.Task[None] | None = None
        self.address = ""

    @property
    def state(self) -> InstanceState:
        return self._state

    async def listen(
        self,
        add_services: Callable[[grpc.aio.Server], None],
        report: Callable[[], LoopReport],
        links: Callable[[], tuple[LinkStats, ...]],
    ) -> None:
        """Serve, and report READY from the first heartbeat on. Raises ConfigError if the port cannot be had."""
        self._server, self._health = build_server(self._config.cluster_token)
        add_services(self._server)
        self.address = bind(self._server, self._config.listen)
        await self._server.start()
        self._report, self._links = report, links
        self._state = InstanceState.READY
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        config = self._config
        self._heartbeat = Heartbeat(config.routers, config.cluster_token, config.heartbeat_s, self.status)
        self._heartbeat_task = asyncio.create_task(self._heartbeat.run(), name="heartbeat")

    def status(self) -> InstanceStatus:
        assert self._report is not None, "an instance reports only once it listens"
        report = self._report()
        return InstanceStatus(
            instance_id=self._instance_id,
            role=self._role,
            state=self._state,
            address=self.address,
            model=self._config.served_name,
            fingerprint=report.fingerprint,
            max_model_len=report.max_model_len,
            block_size=report.block_size,
            blocks=report.blocks,
            waiting_requests=report.waiting_requests,
            running_requests=report.running_requests,
            waiting_tokens=report.waiting_tokens,
            steps=report.steps,
            step_s=report.step_s,
            computed_tokens=report.computed_tokens,
            cached_tokens=report.cached_tokens,
            preemptions=report.preemptions,
            links=self._links(),
        )

    async def drain(self, grace_s: float) -> None:
        """Tell everybody that nothing new is taken, then wait until nothing is left, at most `grace_s`."""
        self._state = InstanceState.DRAINING
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        if self._heartbeat is not None:
            self._heartbeat.send_now()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._busy():  # noqa: ASYNC110 - the report comes from another thread
                    await asyncio.sleep(0.02)

    async def close(self) -> None:
        if self._heartbeat_task is not None:
            self._heartbeat_task.cancel()
            await asyncio.gather(self._heartbeat_task, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(None)

    def _busy(self) -> bool:
        if self._report is None:
            return False
        report = self._report()
        return report.waiting_requests + report.running_requests + report.blocks.leased > 0

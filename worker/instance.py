"""The public side of an instance: its gRPC server, its health service and its heartbeats.

The health service answers SERVING while the instance is READY, and NOT_SERVING while its step is stalled
(`worker/progress.py`) or the instance drains. It answers on the event loop, so no answer means that the process is
stopped. For the service `liveness` it answers SERVING even while a step is stalled: a hung step ends the process.
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

from tandem.core.address import advertised
from tandem.core.config import WorkerConfig
from tandem.core.session import InstanceState, InstanceStatus, LinkStats, Role
from tandem.wire.server import bind, build_server
from tandem.wire.server_tls import ServerTls
from tandem.worker.heartbeat import Heartbeat
from tandem.worker.loop_report import LoopReport

log = logging.getLogger(__name__)

CLOSE_S = 0.2  # for sessions to end by themselves, before they are cancelled
LIVENESS = "liveness"


class PublicSide:
    """Call `listen`, then `send_heartbeats` in a task; `drain` and `close` end it."""

    def __init__(
        self,
        config: WorkerConfig,
        instance_id: str,
        role: Callable[[], Role],
        unreachable_peers: Callable[[], tuple[str, ...]],
    ) -> None:
        self._config = config
        self._role = role
        self._unreachable_peers = unreachable_peers
        self._instance_id = instance_id
        self._state = InstanceState.LOADING
        self._is_stalled = False
        self._server: grpc.aio.Server | None = None
        self._health: health_aio.HealthServicer | None = None
        self._report: Callable[[], LoopReport] | None = None
        self._step_age_s: Callable[[], float] = float
        self._links: Callable[[], tuple[LinkStats, ...]] = tuple
        self._heartbeat: Heartbeat | None = None
        self._tls = None if config.cluster_tls is None else ServerTls.of_cluster(config.cluster_tls)
        self.address = ""

    async def listen(
        self,
        add_services: Callable[[grpc.aio.Server], None],
        report: Callable[[], LoopReport],
        links: Callable[[], tuple[LinkStats, ...]],
        step_age_s: Callable[[], float],
    ) -> None:
        """Serve as READY. Raises ConfigError if the port is in use, or the files of TLS cannot be used."""
        if self._tls is not None:
            self._tls.load()
        self._server, self._health = build_server(self._config.cluster_token)
        add_services(self._server)
        bound = bind(self._server, self._config.listen, self._tls)
        self.address = advertised(bound, self._config.advertise)
        await self._server.start()
        self._report, self._links, self._step_age_s = report, links, step_age_s
        self._state = InstanceState.READY
        for service in ("", LIVENESS):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        config = self._config
        self._heartbeat = Heartbeat(
            config.routers, config.cluster_token, config.heartbeat_s, self.status, config.cluster_tls
        )

    async def send_heartbeats(self) -> None:
        """Until cancelled; after `listen`."""
        assert self._heartbeat is not None, "listen first"
        await self._heartbeat.run()

    async def keep_certificate(self) -> None:
        """Until cancelled; after `listen`, where there is TLS."""
        assert self._tls is not None, "the cluster has no TLS"
        await self._tls.reload_when_changed()

    def status(self) -> InstanceStatus:
        assert self._report is not None, "an instance reports only once it listens"
        report = self._report()
        return InstanceStatus(
            instance_id=self._instance_id,
            role=self._role(),
            state=InstanceState.STALLED if self._is_stalled else self._state,
            address=self.address,
            model=self._config.served_name,
            fingerprint=self._pairing_fingerprint(report.fingerprint),
            weights_hash=report.weights_hash,
            max_model_len=report.max_model_len,
            block_size=report.block_size,
            blocks=report.blocks,
            waiting_requests=report.waiting_requests,
            running_requests=report.running_requests,
            uncomputed_tokens=report.uncomputed_tokens,
            unreserved_tokens=report.unreserved_tokens,
            steps=report.steps,
            step_s=report.step_s,
            computed_tokens=report.computed_tokens,
            cached_tokens=report.cached_tokens,
            preemptions=report.preemptions,
            lease_s=self._config.instance.lease_s,
            links=self._links(),
            step_age_s=self._step_age_s(),
            allocated_blocks=sys.getallocatedblocks(),
            step_cost=report.step_cost,
            step_prompt_tokens=report.step_prompt_tokens,
            certificate_not_after_s=None if self._tls is None else self._tls.not_after_s,
            unreachable_peers=self._unreachable_peers(),
        )

    def _pairing_fingerprint(self, layout_fingerprint: str) -> str:
        """Routers pair instances with equal fingerprints, so the fingerprint contains the plan epoch."""
        epoch = self._config.plan_epoch
        return layout_fingerprint if epoch is None else f"{layout_fingerprint}@{epoch}"

    async def set_stalled(self, is_stalled: bool) -> None:
        """The step in progress is stalled, or has ended after all: tell routers and health clients at once."""
        self._is_stalled = is_stalled
        self.send_heartbeat()
        if self._health is not None:
            status = health_pb2.HealthCheckResponse
            await self._health.set("", status.NOT_SERVING if is_stalled else status.SERVING)

    def set_routers(self, control_addresses: Sequence[str]) -> None:
        """Report to these routers, and to no others."""
        log.info("reports to the routers %s", ", ".join(control_addresses))
        assert self._heartbeat is not None, "listen first"
        self._heartbeat.set_routers(control_addresses)

    def send_heartbeat(self) -> None:
        """The status has changed: report to all routers at once."""
        if self._heartbeat is not None:
            self._heartbeat.send_now()

    async def drain(self, grace_s: float, is_idle: Callable[[], bool]) -> None:
        """Tell routers and health clients that the instance takes no requests, then wait until `is_idle`, for at most
        `grace_s` seconds."""
        self._state = InstanceState.DRAINING
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        self.send_heartbeat()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while not is_idle():  # noqa: ASYNC110 - attempts end in many places
                    await asyncio.sleep(0.02)

    async def close(self) -> None:
        if self._server is not None:
            await self._server.stop(CLOSE_S)

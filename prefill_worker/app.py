"""Puts a prefill worker together: its loop, its sessions, the leases on its KV and the links that KV leaves by."""

import asyncio

import grpc

from tandem.core.config import WorkerConfig
from tandem.core.session import LinkStats, Role
from tandem.engine.engine import Engine
from tandem.kv_transfer.pool import SharedPool
from tandem.kv_transfer.sender import KvSender
from tandem.prefill_worker.loop import LoopCommand, LoopEvent, PrefillLoop
from tandem.prefill_worker.service import PrefillService
from tandem.v1 import transfer_pb2_grpc, worker_pb2_grpc
from tandem.wire.sessions import PrefillServicer
from tandem.wire.transfer import KvTransferServicer
from tandem.worker.instance import LoopReport
from tandem.worker.role import RoleWorker


class PrefillWorker(RoleWorker[LoopCommand, LoopEvent]):
    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config, Role.PREFILL, config.prefill.engine)
        self._service = PrefillService(self._thread.post, config.prefill.lease_s, self._clock)
        self._loop: PrefillLoop | None = None
        self._sender: KvSender | None = None
        self._leases_task: asyncio.Task[None] | None = None

    def make_loop(self, engine: Engine) -> PrefillLoop:
        self._loop = PrefillLoop(engine, self._config.prefill, self._clock)
        return self._loop

    def report(self) -> LoopReport:
        assert self._loop is not None
        return self._loop.report

    def links(self) -> tuple[LinkStats, ...]:
        assert self._sender is not None
        return self._sender.links()

    def deliver(self, events: list[LoopEvent]) -> None:
        self._service.deliver(events)

    async def connect(self, engine: Engine, pool: SharedPool) -> None:
        self._sender = KvSender(engine.layout, pool, self.instance_id, self.link_config)
        self._leases_task = asyncio.create_task(self._service.expire_leases(), name="leases")

    def add_services(self, server: grpc.aio.Server) -> None:
        assert self._sender is not None
        transfer = KvTransferServicer(self._sender, self._service, self._clock)
        transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(transfer, server)
        worker_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(self._service, self._clock), server)

    async def disconnect(self) -> None:
        if self._leases_task is not None:
            self._leases_task.cancel()
            await asyncio.gather(self._leases_task, return_exceptions=True)
        if self._sender is not None:
            await self._sender.close()

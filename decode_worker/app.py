"""Puts a decode worker together: its loop, its routers' sessions, the links that KV arrives by."""

import grpc

from tandem.core.config import WorkerConfig
from tandem.core.session import LinkStats, Role
from tandem.decode_worker.loop import DecodeLoop, LoopCommand, LoopEvent
from tandem.decode_worker.peers import Peers
from tandem.decode_worker.service import DecodeService
from tandem.engine.engine import Engine
from tandem.kv_transfer.pool import SharedPool
from tandem.kv_transfer.receiver import KvReceiver
from tandem.v1 import worker_pb2_grpc
from tandem.wire.sessions import DecodeServicer
from tandem.worker.instance import LoopReport
from tandem.worker.role import RoleWorker


class DecodeWorker(RoleWorker[LoopCommand, LoopEvent]):
    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config, Role.DECODE, config.decode.engine)
        self._service = DecodeService(self._thread.post, Peers(config.cluster_token))
        self._loop: DecodeLoop | None = None
        self._receiver: KvReceiver | None = None

    def make_loop(self, engine: Engine) -> DecodeLoop:
        self._loop = DecodeLoop(engine, self._config.decode, self._clock)
        return self._loop

    def report(self) -> LoopReport:
        assert self._loop is not None
        return self._loop.report

    def links(self) -> tuple[LinkStats, ...]:
        assert self._receiver is not None
        return self._receiver.links()

    def deliver(self, events: list[LoopEvent]) -> None:
        self._service.deliver(events)

    async def connect(self, engine: Engine, pool: SharedPool) -> None:
        section = self._config.decode
        self._receiver = KvReceiver(
            engine.layout,
            engine.pool,
            self.instance_id,
            transport=section.transport,
            checksum=section.checksum,
            timeout_s=section.transfer_timeout_s,
            link_config=self.link_config,
        )
        self._service.serve_with(self._receiver)

    def add_services(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(self._service, self._clock), server)

    async def disconnect(self) -> None:
        await self._service.close()
        if self._receiver is not None:
            await self._receiver.close()

"""Puts a prefill worker together: engine and loop on their thread; sessions, leases and KV links on the event loop."""

import asyncio
import logging

import grpc
from kv_transfer.sender import KvSender

from core.clock import SystemClock
from core.config import WorkerConfig
from core.session import Role
from engine.engine import Engine
from kv_transfer.pool import SharedPool
from prefill_worker.loop import LoopCommand, LoopEvent, PrefillLoop
from prefill_worker.service import PrefillService
from tandem.v1 import transfer_pb2_grpc, worker_pb2_grpc
from wire.sessions import PrefillServicer
from wire.transfer import KvTransferServicer
from worker.engine_setup import load_worker_engine
from worker.instance import Instance
from worker.loop_thread import LoopThread
from worker.process import new_instance_id

log = logging.getLogger(__name__)


class PrefillWorker:
    """A `worker.process.Worker`."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._clock = SystemClock()
        self.instance_id = new_instance_id("prefill")
        self._instance = Instance(config, Role.PREFILL, self.instance_id)
        self._thread: LoopThread[LoopCommand, LoopEvent] = LoopThread(
            "prefill-loop", self._make_loop, self._deliver, self._crashed
        )
        self._service = PrefillService(self._thread.post, config.prefill.lease_s, self._clock)
        self._crash: asyncio.Future[None] | None = None
        self._leases_task: asyncio.Task[None] | None = None
        self._engine: Engine | None = None
        self._loop: PrefillLoop | None = None
        self._pool: SharedPool | None = None
        self._sender: KvSender | None = None

    @property
    def address(self) -> str:
        return self._instance.address

    async def start(self) -> None:
        self._crash = asyncio.get_running_loop().create_future()
        await self._thread.start()
        assert self._engine is not None
        assert self._loop is not None
        loop = self._loop
        self._sender = KvSender(self._engine.layout, self._engine.pool, self._pool, self.instance_id)
        sender = self._sender

        def add_services(server: grpc.aio.Server) -> None:
            worker_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(self._service, self._clock), server)
            transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(
                KvTransferServicer(sender, self._service, self._clock), server
            )

        self._leases_task = asyncio.create_task(self._service.expire_leases(), name="leases")
        await self._instance.listen(add_services, lambda: loop.report, sender.links)

    async def wait_closed(self) -> None:
        assert self._crash is not None, "start first"
        await asyncio.shield(self._crash)

    async def drain_and_stop(self, grace_s: float) -> None:
        await self._instance.drain(grace_s)
        await self._instance.close()
        if self._leases_task is not None:
            self._leases_task.cancel()
            await asyncio.gather(self._leases_task, return_exceptions=True)
        if self._sender is not None:
            await self._sender.close()
        await self._thread.stop()
        if self._engine is not None:
            self._engine.close()
        if self._pool is not None:
            self._pool.close()
        if self._crash is not None and not self._crash.done():
            self._crash.set_result(None)

    def _make_loop(self) -> PrefillLoop:
        """On the loop's thread."""
        self._engine, self._pool = load_worker_engine(self._config, self._config.prefill.engine)
        self._loop = PrefillLoop(self._engine, self._config.prefill, self._clock)
        return self._loop

    def _deliver(self, events: list[LoopEvent]) -> None:
        self._service.deliver(events)

    def _crashed(self, error: BaseException) -> None:
        assert self._crash is not None
        if not self._crash.done():
            self._crash.set_exception(error)

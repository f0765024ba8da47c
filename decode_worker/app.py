"""Puts a decode worker together: engine and loop on their thread; sessions and transfers on the event loop."""

import asyncio

import grpc
from kv_transfer.receiver import KvReceiver

from core.clock import SystemClock
from core.config import WorkerConfig
from core.session import Role
from decode_worker.loop import DecodeLoop, LoopCommand, LoopEvent
from decode_worker.peers import Peers
from decode_worker.service import DecodeService
from engine.engine import Engine
from kv_transfer.pool import SharedPool
from tandem.v1 import worker_pb2_grpc
from wire.sessions import DecodeServicer
from worker.engine_setup import load_worker_engine
from worker.instance import Instance
from worker.loop_thread import LoopThread
from worker.process import new_instance_id


class DecodeWorker:
    """A `worker.process.Worker`."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._clock = SystemClock()
        self.instance_id = new_instance_id("decode")
        self._instance = Instance(config, Role.DECODE, self.instance_id)
        self._thread: LoopThread[LoopCommand, LoopEvent] = LoopThread(
            "decode-loop", self._make_loop, self._deliver, self._crashed
        )
        self._service = DecodeService(
            self._thread.post, Peers(config.cluster_token), config.decode.transfer_timeout_s, self._clock
        )
        self._crash: asyncio.Future[None] | None = None
        self._engine: Engine | None = None
        self._loop: DecodeLoop | None = None
        self._pool: SharedPool | None = None
        self._receiver: KvReceiver | None = None

    @property
    def address(self) -> str:
        return self._instance.address

    async def start(self) -> None:
        self._crash = asyncio.get_running_loop().create_future()
        await self._thread.start()
        assert self._engine is not None
        assert self._loop is not None
        loop, section = self._loop, self._config.decode
        self._receiver = KvReceiver(
            self._engine.layout,
            self._engine.pool,
            self.instance_id,
            road=section.road,
            checksum=section.checksum,
            timeout_s=section.transfer_timeout_s,
        )
        self._service.serve_with(self._receiver)

        def add_services(server: grpc.aio.Server) -> None:
            worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(self._service, self._clock), server)

        await self._instance.listen(add_services, lambda: loop.report, self._receiver.links)

    async def wait_closed(self) -> None:
        assert self._crash is not None, "start first"
        await asyncio.shield(self._crash)

    async def drain_and_stop(self, grace_s: float) -> None:
        await self._instance.drain(grace_s)
        await self._instance.close()
        await self._service.close()
        if self._receiver is not None:
            await self._receiver.close()
        await self._thread.stop()
        if self._engine is not None:
            self._engine.close()
        if self._pool is not None:
            self._pool.close()
        if self._crash is not None and not self._crash.done():
            self._crash.set_result(None)

    def _make_loop(self) -> DecodeLoop:
        """On the loop's thread."""
        self._engine, self._pool = load_worker_engine(self._config, self._config.decode.engine)
        self._loop = DecodeLoop(self._engine, self._config.decode, self._clock)
        return self._loop

    def _deliver(self, events: list[LoopEvent]) -> None:
        self._service.deliver(events)

    def _crashed(self, error: BaseException) -> None:
        assert self._crash is not None
        if not self._crash.done():
            self._crash.set_exception(error)

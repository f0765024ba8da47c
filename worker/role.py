"""What does not depend on a worker's role: engine and loop on one thread, the public side on the event loop.

loop thread:  load engine -> make_loop -> turn (schedule, step, ...)
event loop:   connect -> listen -> deliver(events of each turn) ... -> drain -> disconnect -> close
"""

import asyncio
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import grpc

from tandem.core.clock import SystemClock
from tandem.core.config import EngineSection, WorkerConfig, split_address
from tandem.core.session import LinkStats, Role
from tandem.engine.engine import Engine
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.pool import SharedPool
from tandem.worker.engine_setup import load_worker_engine
from tandem.worker.instance import Instance, LoopReport
from tandem.worker.loop_thread import LoopThread, StepLoop
from tandem.worker.process import new_instance_id

Command = TypeVar("Command")
Event = TypeVar("Event")


class RoleWorker(ABC, Generic[Command, Event]):
    """A `worker.process.Worker`. A role says how its loop is made and what it serves."""

    def __init__(self, config: WorkerConfig, role: Role, engine_section: EngineSection) -> None:
        self._config = config
        self._clock = SystemClock()
        self.instance_id = new_instance_id(role.value)
        self._engine_section = engine_section
        self._instance = Instance(config, role, self.instance_id)
        self._thread: LoopThread[Command, Event] = LoopThread(
            f"{role.value}-loop", self._load_and_make_loop, self.deliver, self._crashed
        )
        self._closed: asyncio.Future[None] | None = None
        self._engine: Engine | None = None
        self._pool: SharedPool | None = None

    @property
    def address(self) -> str:
        return self._instance.address

    @property
    def link_config(self) -> LinkConfig:
        """KV travels over the same interface as the worker's own port."""
        return LinkConfig(bind_host=split_address(self._config.listen)[0])

    # --- what a role adds ---

    @abstractmethod
    def make_loop(self, engine: Engine) -> StepLoop[Command, Event]:
        """On the loop's thread."""

    @abstractmethod
    def report(self) -> LoopReport:
        """The loop's last one."""

    @abstractmethod
    def links(self) -> tuple[LinkStats, ...]: ...

    @abstractmethod
    def deliver(self, events: list[Event]) -> None:
        """Events of one turn of the loop."""

    @abstractmethod
    async def connect(self, engine: Engine, pool: SharedPool) -> None:
        """Make the KV links' end on this side; before the first session."""

    @abstractmethod
    def add_services(self, server: grpc.aio.Server) -> None: ...

    @abstractmethod
    async def disconnect(self) -> None:
        """After the last session: nothing reads or writes the pool when it returns."""

    # --- the life of the process ---

    async def start(self) -> None:
        self._closed = asyncio.get_running_loop().create_future()
        await self._thread.start()
        assert self._engine is not None
        assert self._pool is not None
        await self.connect(self._engine, self._pool)
        await self._instance.listen(self.add_services, self.report, self.links)

    async def wait_closed(self) -> None:
        assert self._closed is not None, "start first"
        await asyncio.shield(self._closed)

    async def drain_and_stop(self, grace_s: float) -> None:
        await self._instance.drain(grace_s)
        await self._instance.close()
        await self.disconnect()
        await self._thread.stop()
        if self._engine is not None:
            self._engine.close()
        if self._pool is not None:
            self._pool.close()
        if self._closed is not None and not self._closed.done():
            self._closed.set_result(None)

    def _load_and_make_loop(self) -> StepLoop[Command, Event]:
        self._engine, self._pool = load_worker_engine(self._config.model, self._engine_section)
        return self.make_loop(self._engine)

    def _crashed(self, error: BaseException) -> None:
        assert self._closed is not None
        if not self._closed.done():
            self._closed.set_exception(error)

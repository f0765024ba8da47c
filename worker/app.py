"""Assembles an instance: engine and loop on one thread, everything else on the event loop.

loop thread:  load engine -> InstanceLoop -> turn (schedule, launch, collect, ...)
event loop:   connect KV links -> listen -> deliver(events of each turn) ... -> drain -> close links -> end
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import grpc

from tandem.core.address import ANY_HOSTS, split_address
from tandem.core.attempt_id import AttemptId
from tandem.core.clock import SystemClock
from tandem.core.config import WorkerConfig, with_secrets
from tandem.core.errors import ConfigError, InternalError, TandemError
from tandem.core.instance_id import make_instance_id
from tandem.core.kv_codec import KvCodec
from tandem.core.session import LinkStats, Role
from tandem.decode_worker.fetcher import KvFetcher
from tandem.decode_worker.peers import Peers
from tandem.engine.engine import Engine
from tandem.engine.ops.kv_codec import NativeKvCodes
from tandem.engine.ops.piece_copy import native_copy_pieces
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.pool import SharedPool
from tandem.kv_transfer.receiver import KvReceiver
from tandem.kv_transfer.remote_pool import RemotePool
from tandem.kv_transfer.sender import KvSender
from tandem.prefill_worker.held_kv import HeldKv, StageStep
from tandem.v1 import transfer_pb2_grpc, worker_pb2_grpc
from tandem.wire.sessions import InstanceServicer
from tandem.wire.transfer import KvTransferServicer
from tandem.worker.engine_setup import check_model_files, load_worker_engine
from tandem.worker.instance import PublicSide
from tandem.worker.loop import InstanceLoop
from tandem.worker.loop_messages import CacheChanged, LoopEvent
from tandem.worker.loop_report import LoopReport
from tandem.worker.loop_thread import LoopThread
from tandem.worker.progress import LOOK_EVERY_S, StallDetector, StepProgress
from tandem.worker.ranks.group import RankGroup
from tandem.worker.service import InstanceService, section_budget

if TYPE_CHECKING:
    from tandem.worker.kv_events import KvEventPublisher

log = logging.getLogger(__name__)

STAGES_EVERY_S = 0.001  # between two looks at later pipeline stages, while a reader waits for layers
STAGES_IDLE_EVERY_S = 0.02  # the same without a reader


class Worker:
    """One instance: its only rank, or rank 0, which starts the other ranks of its host as child processes and waits for
    those of other hosts. Call `start`, then `wait_closed`; `drain_and_stop` ends the instance."""

    def __init__(self, config: WorkerConfig) -> None:
        """Raises ConfigError for a secret that cannot be read."""
        self._config = config = with_secrets(config)
        self._section = config.instance
        self._clock = SystemClock()
        role = Role(config.role)
        self.instance_id = make_instance_id(config.name or role.value, secrets.randbits(32))
        self._budget = section_budget(role, self._section)
        progress = StepProgress(self._clock)
        self._stall = StallDetector(progress, self._clock)
        self._thread = LoopThread(
            f"{role.value}-loop", self._load_and_make_loop, self._deliver, self._crashed, progress
        )
        self._held = HeldKv(self._release_held, self._section.lease_s, self._clock)
        peers = Peers(config.cluster_token, config.cluster_tls, self._tell_routers)
        self._fetcher = KvFetcher(self._thread.post, peers)
        self._public = PublicSide(config, self.instance_id, lambda: self._service.role, peers.unreachable)
        self._service = InstanceService(
            role,
            self._section,
            self._thread.post,
            self._held,
            self._fetcher,
            self._tell_routers,
            self._publish_cache_change,
            self._public.set_routers,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._step_watch: asyncio.Task[None] | None = None
        self._closed: asyncio.Future[None] | None = None
        self._ranks: RankGroup | None = None
        self._engine: Engine | None = None
        self._pools: tuple[SharedPool | RemotePool, ...] = ()
        self._loop: InstanceLoop | None = None
        self._kv_events: KvEventPublisher | None = None
        self._sender: KvSender | None = None
        self._receiver: KvReceiver | None = None

    @property
    def address(self) -> str:
        return self._public.address

    async def start(self) -> None:
        """Load the model, listen and report; returns when READY. Raises a TandemError if it cannot."""
        loop = asyncio.get_running_loop()
        self._closed = loop.create_future()
        if self._section.engine.shape.num_ranks > 1:
            self._ranks = RankGroup(
                self._config.model,
                self._section.engine,
                lambda error: _call_soon(loop, self._crashed, error),
                self._config.ranks,
                self._config.cluster_token or "",
            )
            self._ranks.start()
        try:
            await self._thread.start()
        except BaseException:
            if self._ranks is not None:
                self._ranks.close()
                if not self._closed.cancel():
                    self._closed.exception()  # the same loss of a rank, which this call raises
            raise
        assert self._engine is not None
        section = self._section
        links = LinkConfig(bind_host=_kv_host(self._config))
        is_native = self._engine.ops_name.startswith("native")
        codes = NativeKvCodes() if is_native else None
        self._sender = KvSender(self._engine.layout, self._pools, self.instance_id, links, codes)
        self._receiver = KvReceiver(
            self._engine.layout,
            [pool.tensor if isinstance(pool, SharedPool) else pool for pool in self._pools],
            self.instance_id,
            transport=section.transport,
            checksum=section.checksum,
            timeout_s=section.transfer_timeout_s,
            stream_from_bytes=section.stream_kv_from,
            copy_pieces=native_copy_pieces() if is_native else None,
            codec=KvCodec(section.kv_codec),
            codes=codes,
            link_config=links,
        )
        self._fetcher.fetch_with(self._receiver)
        self._kv_events = self._start_kv_events()
        self._tasks.append(self._spawn(self._held.expire_leases(), "leases"))
        if self._ranks is not None and section.engine.shape.pp > 1:
            self._tasks.append(self._spawn(self._watch_stages(self._ranks), "watch stages"))
        await self._public.listen(self._add_services, self._report, self._links, lambda: self._stall.age_s)
        if self._config.cluster_tls is not None:
            self._tasks.append(self._spawn(self._public.keep_certificate(), "certificate"))
        self._tasks.append(self._spawn(self._public.send_heartbeats(), "heartbeats"))
        self._step_watch = self._spawn(self._watch_steps(), "watch steps")

    async def wait_closed(self) -> None:
        """Returns when the instance has stopped. If it ended by itself, raises the error that has ended it."""
        assert self._closed is not None, "start first"
        await asyncio.shield(self._closed)

    async def drain_and_stop(self, grace_s: float) -> None:
        """Take nothing new, let running requests finish for up to `grace_s`, then stop and free everything."""
        await self._public.drain(grace_s, is_idle=lambda: self._thread.is_idle and self._service.is_idle)
        await _cancel(*self._tasks)
        self._service.end_sessions()
        await self._public.close()
        # Once both ends of the links are closed, nothing reads or writes the pools.
        await self._fetcher.close()
        assert self._receiver is not None
        assert self._sender is not None
        await self._receiver.close()
        await self._sender.close()
        await self._thread.stop()
        if self._kv_events is not None:
            await asyncio.to_thread(self._kv_events.close)
        if self._ranks is not None:
            await asyncio.to_thread(self._ranks.close)
        if self._step_watch is not None:  # last, because a hung step would keep the thread from stopping
            await _cancel(self._step_watch)
        if self._engine is not None:
            self._engine.close()
        for pool in self._pools:
            pool.close()
        if self._closed is not None and not self._closed.done():
            self._closed.set_result(None)

    # --- parts -------------------------------------------------------------------------------------------------------

    def _load_and_make_loop(self) -> InstanceLoop:
        """On the loop's thread: the thread that loads an engine also computes its steps."""
        self._engine, self._pools = load_worker_engine(self._config.model, self._section.engine, self._ranks)
        check_model_files(self._config, self._engine.layout.weights_hash)
        self._loop = InstanceLoop(
            self._engine,
            self._budget,
            self._clock,
            prefix_cache=self._section.prefix_cache,
            step_cost=self._section.step_cost,
            records_cache_changes=self._section.kv_events.endpoint is not None,
            layer_computed=self._layer_computed,
        )
        return self._loop

    def _start_kv_events(self) -> "KvEventPublisher | None":
        """None without an endpoint in the settings. Raises ConfigError if the packages are missing or the endpoint
        cannot be used."""
        settings = self._section.kv_events
        if settings.endpoint is None:
            return None
        try:
            from tandem.worker.kv_events import KvEventPublisher
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"kv_events.endpoint is set, and {error.name} is missing; pip install 'tandem-serve[kv-events]'"
            ) from error
        config = self._config
        publisher = KvEventPublisher(
            settings, name=config.name or config.role, model=config.served_name, block_size=self._report().block_size
        )
        publisher.start()
        return publisher

    def _add_services(self, server: grpc.aio.Server) -> None:
        assert self._sender is not None
        transfer = KvTransferServicer(self._sender, self._held, self._clock)
        transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(transfer, server)
        servicer = InstanceServicer(self._service, self._clock, self.instance_id)
        worker_pb2_grpc.add_InstanceServiceServicer_to_server(servicer, server)

    def _report(self) -> LoopReport:
        assert self._loop is not None
        return self._loop.report

    def _links(self) -> tuple[LinkStats, ...]:
        """Totals of KV that comes in. Each transfer is counted by its reader only."""
        assert self._receiver is not None
        return self._receiver.links()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """`work` runs until it is cancelled. If it ends before that, the instance ends."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            error = task.exception()
            log.critical("%s: the task '%s' has ended", self.instance_id, task.get_name(), exc_info=error)
            self._crashed(error or InternalError(f"the task '{task.get_name()}' has ended"))

    async def _watch_steps(self) -> None:
        is_stalled = False
        while not self._stall.is_hung:
            await asyncio.sleep(LOOK_EVERY_S)
            self._stall.look()
            if self._stall.is_stalled is not is_stalled:
                is_stalled = self._stall.is_stalled
                if is_stalled:
                    log.warning("%s: a step is stalled for %.1f s", self.instance_id, self._stall.age_s)
                else:
                    log.warning("%s: the stalled step has ended", self.instance_id)
                await self._public.set_stalled(is_stalled)
        raise InternalError(f"a step of {self.instance_id} has not ended in {self._stall.age_s:.0f} s")

    async def _watch_stages(self, ranks: RankGroup) -> None:
        """Tell readers how far later stages are, until cancelled. The loop's thread may be waiting for these stages, so
        it cannot do that."""
        while True:
            for number, at in enumerate(ranks.later_stages(), start=1):
                self._held.stage_computed(number, StageStep(*at))
            await asyncio.sleep(STAGES_EVERY_S if self._held.wants_layers else STAGES_IDLE_EVERY_S)

    # --- callbacks ---------------------------------------------------------------------------------------------------

    def _layer_computed(self, num_layers: int) -> None:
        """On the loop's thread, during a step. Without a reader the event loop is not woken."""
        if self._held.wants_layers:
            self._thread.call_soon(lambda: self._held.layers_computed(num_layers))

    def _deliver(self, events: list[LoopEvent]) -> None:
        self._service.deliver(events)

    def _release_held(self, attempt_id: AttemptId) -> None:
        self._service.release_held(attempt_id)

    def _publish_cache_change(self, event: CacheChanged) -> None:
        if self._kv_events is not None:
            self._kv_events.publish(event.changes)

    def _tell_routers(self) -> None:
        self._public.send_heartbeat()

    def _crashed(self, error: BaseException) -> None:
        assert self._closed is not None
        if not self._closed.done():
            self._closed.set_exception(error)


def _kv_host(config: WorkerConfig) -> str:
    """KV travels over the interface of the instance's port. Gloo tells its peer the address that it listens on, so it
    must be the address of one interface."""
    host, _ = split_address(config.listen)
    return config.advertise if host in ANY_HOSTS and config.advertise is not None else host


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[TandemError], None], error: TandemError) -> None:
    with contextlib.suppress(RuntimeError):  # the event loop is closed, because the process ends
        loop.call_soon_threadsafe(call, error)


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

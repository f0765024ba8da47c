"""A router process: HTTP and gRPC for clients, the control port for workers, all on one event loop.

HTTP  -> HttpApp ----------+
                           +-> TextService -> Dispatcher -> Fleet -> sessions with workers
gRPC  -> InferenceServicer +                      |            ^
                                                  v            |
control <- heartbeats, `tandem status`         metrics      heartbeats
"""

import asyncio
import logging
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from random import Random, SystemRandom
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from starlette.types import ASGIApp

from tandem.core.access import OpenAccess
from tandem.core.address import advertised
from tandem.core.clock import SystemClock
from tandem.core.config import RouterConfig, with_secrets
from tandem.core.errors import ConfigError, InternalError
from tandem.core.secret_source import file_of
from tandem.core.workload_profile import WorkloadProfile
from tandem.router.announcement import announce
from tandem.router.api_keys import ApiKeyAccess, load_keys
from tandem.router.dispatch import Dispatcher
from tandem.router.fleet_registry import FleetRegistry
from tandem.router.http_app import HttpApp
from tandem.router.http_body import BodyBudget
from tandem.router.http_server import HttpServer, raise_descriptor_limit
from tandem.router.http_tracing import TracedApi
from tandem.router.metrics import Metrics
from tandem.router.profile import ProfileObserver
from tandem.router.records import RequestLog
from tandem.router.request_spans import RequestSpans
from tandem.router.sampling_defaults import load_sampling_defaults
from tandem.router.tenant_metrics import TenantMetrics
from tandem.router.text_service import TextService
from tandem.router.tokenizer import TextTokenizer
from tandem.router.ui.cluster_view import ClusterView
from tandem.router.ui.pages import Pages, ui_pages
from tandem.scheduling.routing_settings import RoutingSettings
from tandem.v1 import inference_pb2, inference_pb2_grpc, worker_pb2_grpc
from tandem.wire.fleet import FleetServicer
from tandem.wire.inference import InferenceServicer
from tandem.wire.server import bind, build_public_server, build_server
from tandem.wire.server_tls import ServerTls
from tandem.wire.sessions import InstanceSession

if TYPE_CHECKING:
    from tandem.router.tracing import Tracer

logger = logging.getLogger(__name__)

INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

_TOKENIZER_THREADS = 2
_HEALTH_PERIOD_S = 0.1
_FLUSH_S = 2.0  # for complete responses that are still being sent


class RouterApp:
    """`start`, then `wait_closed`; `drain_and_stop` ends it. Nothing happens before `start`.

    `address` (HTTP), `grpc_address` and `control_address` have their actual ports after `start`.
    """

    def __init__(self, config: RouterConfig) -> None:
        """Raises ConfigError for a secret or API keys that cannot be read."""
        self.address = ""
        self.grpc_address = ""
        self.control_address = ""
        self.instance_id = ""
        self._config = config = with_secrets(config)
        self._clock = SystemClock()
        self._resources = AsyncExitStack()
        self._background: list[asyncio.Task[None]] = []
        self._is_closing = False
        self._is_closed = asyncio.Event()

        settings = config.router
        self._metrics = Metrics(settings.slo)
        self._keys = None if settings.api_keys is None else ApiKeyAccess(load_keys(settings.api_keys), self._clock)
        self._public_tls = None if settings.tls is None else ServerTls.of_clients(settings.tls)
        self._cluster_tls = None if config.cluster_tls is None else ServerTls.of_cluster(config.cluster_tls)
        self._access = OpenAccess() if self._keys is None else self._keys
        tenants = () if self._keys is None else (TenantMetrics(self._keys, self._metrics.registry),)
        self.log = RequestLog()
        profile = WorkloadProfile(window_s=settings.profile_window_s, random=Random(), now_s=self._clock.now_s())
        observer = ProfileObserver(profile, [slo.name for slo in settings.slo])
        self._dispatcher = Dispatcher(
            model=config.served_name,
            open_session=partial(
                InstanceSession.open, clock=self._clock, token=config.cluster_token, tls=config.cluster_tls
            ),
            heartbeat_timeout_s=config.heartbeat_timeout_s,
            clock=self._clock,
            routing=RoutingSettings.of(settings),
            request_timeout_s=settings.request_timeout_s,
            observers=(self._metrics.requests, self._metrics.slo, *tenants, self.log, observer),
            profile=observer,
        )
        self._registry = FleetRegistry(
            config.served_name, self._dispatcher, self.log, profile, self._clock, settings.plan
        )
        self._metrics.watch(self._dispatcher)
        if settings.vllm_metrics:
            self._metrics.add_vllm_names(self._dispatcher, config.served_name)
        self._metrics.watch_replanning(lambda: self._registry.replan)
        certificates = {"router.tls": self._public_tls, "cluster_tls": self._cluster_tls}
        self._metrics.watch_certificates({setting: tls for setting, tls in certificates.items() if tls is not None})

    async def start(self) -> None:
        """Listen on all three ports. Raises CheckpointError (tokenizer) or ConfigError (port)."""
        try:
            await self._start()
        except BaseException:
            await self._close()
            raise

    async def wait_closed(self) -> None:
        """Returns after `drain_and_stop`. Raises the error of a background task that fails, InternalError for one that
        ends in another way."""
        closed = asyncio.create_task(self._is_closed.wait())
        try:
            done, _ = await asyncio.wait((closed, *self._background), return_when=asyncio.FIRST_COMPLETED)
        finally:
            closed.cancel()
        for task in done:
            if task in self._background and not self._is_closing:
                error = None if task.cancelled() else task.exception()
                logger.critical("the router's task '%s' has ended", task.get_name(), exc_info=error)
                raise error or InternalError(f"the router's task '{task.get_name()}' has ended")
        await self._is_closed.wait()

    async def drain_and_stop(self, grace_s: float) -> None:
        """Refuse new requests, wait for running ones for `grace_s` at most, end the rest, and close everything."""
        self._dispatcher.refuse_new()
        try:
            async with asyncio.timeout(grace_s):
                await self._dispatcher.wait_until_idle()
        except TimeoutError:
            self.abort_requests()
        await self._close()

    def abort_requests(self) -> None:
        """End all requests now; a drain in progress then ends too."""
        self._dispatcher.refuse_new()
        self._dispatcher.abort_all()

    async def _start(self) -> None:
        config, settings, random = self._config, self._config.router, SystemRandom()
        raise_descriptor_limit()
        self.instance_id = f"router-{random.getrandbits(48):012x}"
        tracer = self._start_tracer(random)
        executor = self._resources.enter_context(ThreadPoolExecutor(_TOKENIZER_THREADS, "tokenizer"))
        tokenizer = TextTokenizer.load(
            config.model,
            clock=self._clock,
            executor=executor,
            parse_control_tokens=settings.parse_control_tokens,
        )
        service = TextService(
            generator=self._dispatcher,
            tokenizer=tokenizer,
            model=config.served_name,
            random=random,
            settings=settings,
            on_refusal=(self._metrics.requests.refused, self.log.refused),
            defaults=load_sampling_defaults(config.model, settings.generation_config),
        )
        if self._keys is not None and settings.api_keys and file_of(settings.api_keys):
            self._spawn(self._keys.reload_when_changed(settings.api_keys), "API keys")
        # The stack closes in reverse order: the fleet ends last, the control port after the ports for clients.
        self._spawn(self._dispatcher.fleet.run(), "fleet")
        self._spawn(self._dispatcher.watch_timer(), "timer")
        control, control_health = build_server(config.cluster_token)
        worker_pb2_grpc.add_FleetServiceServicer_to_server(FleetServicer(self._registry), control)
        self.control_address = bind(control, settings.control, self._load(self._cluster_tls, "cluster certificate"))
        await self._serve(control, control_health)
        await control_health.set("", health_pb2.HealthCheckResponse.SERVING)
        if config.controller is not None:
            own = advertised(self.control_address, config.advertise)
            self._spawn(announce(config.controller, own, config.cluster_token, config.cluster_tls), "announcement")

        bodies = BodyBudget(settings.max_bodies)
        public, health = build_public_server(settings.max_body, self._access)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(
                service,
                self._clock,
                random,
                settings.write_timeout_s,
                self._access,
                tracer,
                hold_bytes=bodies.hold,
            ),
            public,
        )
        if settings.reflection:
            names = (INFERENCE_SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
            reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), public)
        tls = self._load(self._public_tls, "certificate")
        self.grpc_address = bind(public, settings.grpc, tls)
        await self._serve(public, health)
        self._spawn(self._update_health(health), "health")

        http_app: ASGIApp = HttpApp(
            service=service,
            tokenizer=tokenizer,
            settings=settings,
            render_metrics=self._metrics.render,
            clock=self._clock,
            random=random,
            access=self._access,
            bodies=bodies,
            pages=ui_pages(self._view()) if settings.ui else Pages(),
        )
        if tracer is not None:
            http_app = TracedApi(http_app, tracer)
        http = HttpServer(http_app, settings, tls, stop_timeout_s=_FLUSH_S)
        self.address = await http.start()
        self._resources.push_async_callback(http.stop)
        self._spawn(http.wait_closed(), "http")

    def _start_tracer(self, random: Random) -> "Tracer | None":
        """None if no traces are wanted. Raises ConfigError without the packages for them."""
        settings = self._config.router.tracing
        if settings.endpoint is None:
            return None
        try:
            from tandem.router.tracing import Tracer
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"router.tracing.endpoint is set, and {error.name} is missing; pip install 'tandem-serve[tracing]'"
            ) from error
        tracer = Tracer(settings, instance_id=self.instance_id, clock=self._clock, random=random)
        self._resources.push_async_callback(asyncio.to_thread, tracer.close)
        self._dispatcher.observers.add(RequestSpans(tracer, self._config.served_name))
        return tracer

    def _view(self) -> ClusterView:
        return ClusterView(
            model=self._config.served_name,
            dispatcher=self._dispatcher,
            log=self.log,
            classes=self._config.router.slo,
            plan=lambda: self._registry.plan,
            replan=lambda: self._registry.replan,
            clock=self._clock,
        )

    async def _serve(self, server: grpc.aio.Server, health: health_aio.HealthServicer) -> None:
        await server.start()
        self._resources.push_async_callback(server.stop, _FLUSH_S)
        self._resources.push_async_callback(health.enter_graceful_shutdown)

    def _load(self, tls: ServerTls | None, name: str) -> ServerTls | None:
        """Ready for servers, and kept up to date. Raises ConfigError for files that cannot be used."""
        if tls is not None:
            tls.load()
            self._spawn(tls.reload_when_changed(), name)
        return tls

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._background.append(task)
        self._resources.push_async_callback(_end, task)

    async def _update_health(self, health: health_aio.HealthServicer) -> None:
        """Keep the gRPC health service equal to `/health`."""
        reported: bool | None = None
        while True:
            is_serving = self._dispatcher.is_serving
            if is_serving is not reported:
                status = health_pb2.HealthCheckResponse
                for service in ("", INFERENCE_SERVICE):
                    await health.set(service, status.SERVING if is_serving else status.NOT_SERVING)
                reported = is_serving
            await asyncio.sleep(_HEALTH_PERIOD_S)

    async def _close(self) -> None:
        self._is_closing = True
        await self._resources.aclose()
        self._is_closed.set()


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

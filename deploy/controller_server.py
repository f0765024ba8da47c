"""The gRPC server of a controller."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from grpc_health.v1 import health_pb2

from tandem.core.config import ServeConfig
from tandem.deploy.kept_task import cancel
from tandem.v1 import controller_pb2_grpc
from tandem.wire.controller import ClusterHandler, ControllerServicer
from tandem.wire.server import bind, build_server
from tandem.wire.server_tls import ServerTls

_STOP_S = 0.5  # for responses on their way


@asynccontextmanager
async def serve_controller(handler: ClusterHandler, config: ServeConfig) -> AsyncIterator[str]:
    """Serve at `config.controller` inside the block; yields the address with its actual port. Raises ConfigError if the
    port cannot be had, or the files of TLS cannot be used."""
    assert config.cluster_token, "whoever makes a cluster gives it a token"
    server, health = build_server(config.cluster_token)
    controller_pb2_grpc.add_ControllerServiceServicer_to_server(ControllerServicer(handler), server)
    tls, reloading = None, list[asyncio.Task[None]]()
    if config.cluster_tls is not None:
        tls = ServerTls.of_cluster(config.cluster_tls)
        tls.load()
        reloading.append(asyncio.create_task(tls.reload_when_changed(), name="certificate"))
    try:
        bound = bind(server, config.controller, tls)
        await server.start()
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        yield bound
    finally:
        await cancel(reloading)
        await server.stop(_STOP_S)

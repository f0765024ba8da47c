"""The life of a router's process: listen, serve, drain, end."""

import asyncio
import gc
import logging
import signal

import uvloop

from tandem.core.config import RouterConfig
from tandem.core.log_lines import announce, configure_logging
from tandem.router.app import RouterApp

log = logging.getLogger(__name__)


def run_router(config: RouterConfig, grace_s: float) -> None:
    """One router until SIGTERM or SIGINT, and then for `grace_s` at most until requests have ended; a second signal
    ends them. Raises ConfigError or CheckpointError if the router cannot start."""
    configure_logging(config.log_format, "router")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config, grace_s))


async def _serve(config: RouterConfig, grace_s: float) -> None:
    app = RouterApp(config)
    await app.start()
    gc.freeze()  # what start-up has made stays; a look at it would stop the event loop for 60 ms
    stop_requested = asyncio.Event()

    def on_signal() -> None:
        if stop_requested.is_set():
            app.abort_requests()
        stop_requested.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    announce(log, f"HTTP     {'http' if config.router.tls is None else 'https'}://{app.address}")
    announce(log, f"gRPC     {app.grpc_address}")
    announce(log, f"control  {app.control_address}")

    closed = asyncio.create_task(app.wait_closed())
    stopped = asyncio.create_task(stop_requested.wait())
    await asyncio.wait((closed, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    await app.drain_and_stop(grace_s)
    await closed

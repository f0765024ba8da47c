"""`python -m router --config FILE`: one router process, without Ray."""

import argparse
import asyncio
import gc
import logging
import signal
import sys
from pathlib import Path

import uvloop

from tandem.core.config import RouterConfig
from tandem.core.config_file import load_config
from tandem.core.errors import TandemError
from tandem.router.app import RouterApp


async def serve(config: RouterConfig, grace_s: float) -> None:
    """Run until SIGTERM or SIGINT, then for `grace_s` at most until requests have ended; a second signal ends them.

    Raises ConfigError or CheckpointError if it cannot start.
    """
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
    print(f"HTTP     http://{app.address}")
    print(f"gRPC     {app.grpc_address}")
    print(f"control  {app.control_address}", flush=True)

    closed = asyncio.create_task(app.wait_closed())
    stopped = asyncio.create_task(stop_requested.wait())
    await asyncio.wait((closed, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    await app.drain_and_stop(grace_s)
    await closed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m router", description="Run one router process.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the settings of a RouterConfig")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds that requests may take to end (default 10)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # `serve` prints the addresses
    try:
        config = load_config(arguments.config, RouterConfig)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(config, arguments.grace))
    except TandemError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

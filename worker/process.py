"""The processes of an instance, and of its ranks on another host: load, serve, drain, end.

LOADING --start()--> READY --drain()--> DRAINING --no request is left, or the grace has ended--> stopped
                       |                   |
                       +---- a failure ----+--> the process ends at once, with status 1
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import uvloop

from tandem.core.config import WorkerConfig
from tandem.core.config_file import load_config
from tandem.core.errors import TandemError
from tandem.core.instance_section import RoleName
from tandem.core.log_lines import announce, configure_logging
from tandem.worker.app import Worker
from tandem.worker.openmp_files import remove_openmp_files
from tandem.worker.ranks.host import RankHost

log = logging.getLogger(__name__)

DRAIN_GRACE_S = 10.0


def run_worker(config: WorkerConfig, grace_s: float, *, verbose: bool = False) -> int:
    """Run one instance until SIGTERM or SIGINT, and then until its requests have ended, for at most `grace_s` seconds.
    A second signal ends the process at once. Returns the exit status. Raises a TandemError if the instance cannot
    start."""
    level = logging.DEBUG if verbose else logging.INFO
    configure_logging(config.log_format, config.name or config.role, level)
    remove_openmp_files()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(Worker(config), grace_s))


def run_ranks(config: WorkerConfig, grace_s: float) -> int:
    """Run the ranks of an instance on one more host until the instance ends; after SIGTERM or SIGINT for at most
    `grace_s` seconds more. Returns the exit status. Raises a TandemError if they cannot join the instance."""
    configure_logging(config.log_format, f"{config.name or config.role} ranks")
    remove_openmp_files()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(RankHost(config), grace_s))


def run_from_command_line(module: str, role: RoleName | None = None) -> int:
    """`python -m <module> --config FILE`: one instance, whose role is `role`, or else the file's. Returns the exit
    status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=f"Run one {role or ''} instance of Tandem by hand: for debugging, and for machines without Ray.",
        epilog="The file holds: model, listen, routers (control addresses to report to), cluster_token, and a section "
        "'instance' with the settings that `tandem serve` knows. See examples/prefill_worker.yaml.",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the instance's settings")
    parser.add_argument("--verbose", action="store_true", help="log every step of a request's life")
    args = parser.parse_args()
    try:
        config = load_config(args.config, WorkerConfig)
        if role is not None:
            config = config.model_copy(update={"role": role})
        return run_worker(config, DRAIN_GRACE_S, verbose=args.verbose)
    except TandemError as error:
        print(f"{parser.prog}: {error.message}", file=sys.stderr)
        return 1


async def _run(worker: Worker | RankHost, grace_s: float) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    starting = asyncio.create_task(worker.start(), name="start")
    stopping = asyncio.create_task(stop.wait(), name="stop-signal")
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        # The loop thread is inside torch or the compiler, which nothing can interrupt. There are no requests yet, and
        # the kernel releases what the process holds.
        os._exit(0)
    await starting
    announce(log, f"{worker.instance_id} is ready on {worker.address}")
    closed = asyncio.create_task(worker.wait_closed(), name="closed")
    await asyncio.wait({closed, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not closed.done():
        for signum in (signal.SIGTERM, signal.SIGINT):  # a second signal ends it at once
            loop.remove_signal_handler(signum)
        draining = asyncio.create_task(worker.drain_and_stop(grace_s), name="drain")
        await asyncio.wait({closed, draining}, return_when=asyncio.FIRST_COMPLETED)
        if draining.done():
            draining.result()
    stopping.cancel()
    if (error := closed.exception() if closed.done() else None) is not None:
        log.critical("%s has failed, its process ends: %s", worker.instance_id, error)
        logging.shutdown()
        os._exit(1)  # as above; a thread may be in a step that never ends
    await closed
    return 0

"""`tandem stop`: end a running `tandem serve` from another terminal."""

import argparse
import contextlib
import os
import signal
import time

from tandem.cli.common import add_pid_argument, complain, find_run, say
from tandem.deploy.run_state import is_alive

HELP = "stop the running cluster"
DESCRIPTION = """\
Tell the running `tandem serve` of this user to stop, and wait until it has: it takes no new requests, lets those that
run finish, and leaves no process behind."""
EPILOG = """\
examples:
  tandem stop             as Ctrl-C in its terminal
  tandem stop --now       without waiting for running requests
"""
_POLL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--now", action="store_true", help="do not wait for running requests")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="how long to wait (default 60)")
    add_pid_argument(parser)


def run(args: argparse.Namespace) -> int:
    state = find_run(args.pid)
    os.kill(state.pid, signal.SIGTERM)
    if args.now:
        time.sleep(_POLL_S)  # two signals that are pending together are one
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGTERM)
    until_s = time.monotonic() + args.timeout
    while is_alive(state):
        if time.monotonic() > until_s:
            complain(f"tandem stop: pid {state.pid} still runs after {args.timeout:.0f} s; try: tandem stop --now")
            return 1
        time.sleep(_POLL_S)
    say(f"stopped {state.model} (pid {state.pid})")
    return 0

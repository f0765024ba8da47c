"""`tandem stop`: end a running `tandem serve` from another terminal."""

import contextlib
import os
import signal
import time
from typing import Annotated

import typer

from tandem.cli.common import Pid, find_run, seconds_from
from tandem.cli.output import print_line
from tandem.core.errors import ConfigError, UnavailableError
from tandem.deploy.run_state import is_alive

EPILOG = """\
examples:
  tandem stop             as Ctrl-C in its terminal
  tandem stop --now       without waiting for running requests"""
_POLL_S = 0.1


def run(
    now: Annotated[bool, typer.Option("--now", help="do not wait for running requests")] = False,
    timeout: Annotated[float, typer.Option(parser=seconds_from(0), help="how long to wait, in seconds")] = 60.0,
    pid: Pid = None,
) -> int:
    """Tell the running `tandem serve` of this user to stop, and wait until it has ended. It takes no new requests, lets
    running requests finish, and leaves no process behind."""
    state = find_run(pid)
    if state.cluster:  # a signal would end its controller only
        raise ConfigError(f"the cluster '{state.cluster}' was started with `tandem up`; end it with: tandem down")
    os.kill(state.pid, signal.SIGTERM)
    if now:
        time.sleep(_POLL_S)  # two signals that are pending together are one
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGTERM)
    until_s = time.monotonic() + timeout
    while is_alive(state):
        if time.monotonic() > until_s:
            raise UnavailableError(f"pid {state.pid} still runs after {timeout:.0f} s; try: tandem stop --now")
        time.sleep(_POLL_S)
    print_line(f"stopped {state.model} (pid {state.pid})")
    return 0

"""`tandem down`: end a cluster of `tandem up`."""

import os
import signal
import time
from typing import Annotated

import typer

from tandem.cli.common import Grace, Name, ask_controller, lost_controller, state_folders
from tandem.cli.output import print_line
from tandem.core.errors import UnavailableError
from tandem.deploy.cluster_folder import ClusterFolder
from tandem.deploy.process_identity import ProcessIdentity
from tandem.deploy.run_state import RunState, is_alive

EPILOG = """\
examples:
  tandem down
  tandem down --now           without waiting for running requests
  tandem down --name second"""
_POLL_S = 0.05
_END_S = 20.0  # after the grace period, for processes to close
_DEFAULT_GRACE_S = 10.0


def run(
    name: Name = "default",
    now: Annotated[bool, typer.Option("--now", help="do not wait for running requests")] = False,
    grace: Grace = None,
) -> int:
    """End a cluster that `tandem up` has started: it takes no new requests, running requests finish, and no process is
    left. It also ends the processes of a cluster whose controller has ended. The logs stay."""
    folder = ClusterFolder.of_name(state_folders().clusters, name)
    grace_s = 0.0 if now else grace
    if (run := folder.live_run()) is not None:
        ask_controller(run, lambda client: client.stop(grace_s))
        _wait_ended(run)
        if run.ray:  # its controller has no files here
            folder.clear()
    elif (lost := folder.last_run()) is not None and lost.ray:
        raise UnavailableError(lost_controller(lost))
    elif not (folder.path / "desired.json").exists():
        raise UnavailableError(f"no cluster '{name}' has been started by this user")
    else:
        _end_processes(folder, _DEFAULT_GRACE_S if grace_s is None else grace_s)
    print_line(f"the cluster '{name}' has ended; its logs are in {folder.logs}")
    return 0


def _wait_ended(run: RunState) -> None:
    until_s = time.monotonic() + _END_S
    while is_alive(run):
        if time.monotonic() > until_s:
            raise UnavailableError(f"the controller ({run.controller}) still runs after {_END_S:g} s")
        time.sleep(_POLL_S)


def _end_processes(folder: ClusterFolder, grace_s: float) -> None:
    """In the place of a controller. Routers end first, so that the requests that they have accepted can finish."""
    with folder.lock():
        processes = [(record.spec.name, record.identity) for record in folder.records().load()]
        routers = [identity for name, identity in processes if name.startswith("router-")]
        _end(routers, grace_s)
        _end([identity for _, identity in processes], grace_s)
        folder.clear()


def _end(processes: list[ProcessIdentity], grace_s: float) -> None:
    signals = ((signal.SIGTERM, grace_s + _END_S), (signal.SIGKILL, _END_S))
    for number, wait_s in signals if grace_s else signals[1:]:
        for process in processes:
            _signal(process, number)
        until_s = time.monotonic() + wait_s
        while any(process.is_alive for process in processes) and time.monotonic() < until_s:
            time.sleep(_POLL_S)


def _signal(process: ProcessIdentity, number: signal.Signals) -> None:
    """The descriptor holds the pid fast, so the signal cannot reach a later process."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if process.is_alive:
            signal.pidfd_send_signal(descriptor, number)
    finally:
        os.close(descriptor)

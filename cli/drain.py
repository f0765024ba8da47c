"""`tandem drain`: take a process out of service, or put it back."""

from typing import Annotated

import typer

from tandem.cli.common import Grace, Pid, Process, Timeout, ask_controller, find_run, print_change

EPILOG = """\
examples:
  tandem drain decode-1
  tandem drain decode-1 --undo"""


def run(
    process: Process,
    undo: Annotated[bool, typer.Option("--undo", help="start the process again")] = False,
    grace: Grace = None,
    timeout: Timeout = 900.0,
    pid: Pid = None,
) -> int:
    """Take a process out of service: it takes no new requests, finishes those that it has, and ends. It stays out,
    also over a restart of the controller, until `--undo` starts it again."""
    run = find_run(pid)
    print_change(ask_controller(run, lambda client: client.drain(process, grace, undo=undo), timeout))
    return 0

"""`tandem scale`: change the number of workers while the cluster runs."""

import os
import signal
from typing import Annotated

import typer

from tandem.cli.common import Pid, find_run, state_folders
from tandem.cli.output import print_line
from tandem.core.errors import ConfigError

EPILOG = """\
examples:
  tandem scale --prefill 2
  tandem scale --prefill 1 --decode 3
  tandem status                         shows when they have joined"""


def run(
    prefill: Annotated[int | None, typer.Option(min=1, help="number of prefill workers")] = None,
    decode: Annotated[int | None, typer.Option(min=1, help="number of decode workers")] = None,
    colocated: Annotated[int | None, typer.Option(min=1, help="number of workers that do both")] = None,
    pid: Pid = None,
) -> int:
    """Change the number of workers of the running `tandem serve`. New workers join when their model is loaded; workers
    that leave take no new requests and finish those that they have. No request fails. The threads of running workers
    stay as they are."""
    asked = {"prefill": prefill, "decode": decode, "colocated": colocated}
    wanted = {role: number for role, number in asked.items() if number is not None}
    if not wanted:
        raise ConfigError("give at least one of --prefill N, --decode N and --colocated N")
    state = find_run(pid)
    state_folders().write_scale_request(state.pid, wanted)
    os.kill(state.pid, signal.SIGUSR1)
    numbers = " and ".join(f"{number} {role}" for role, number in wanted.items())
    print_line(f"asked for {numbers}; its terminal and `tandem status` show when the workers are ready")
    return 0

"""`tandem scale`: change the number of workers while the cluster runs."""

from typing import Annotated

import typer

from tandem.cli.common import Grace, Pid, Timeout, ask_controller, find_run, print_change
from tandem.core.errors import ConfigError
from tandem.core.instance_section import MAX_INSTANCES

EPILOG = """\
examples:
  tandem scale --prefill 2
  tandem scale --prefill 1 --decode 3"""


def run(
    prefill: Annotated[int | None, typer.Option(min=1, max=MAX_INSTANCES, help="number of prefill workers")] = None,
    decode: Annotated[int | None, typer.Option(min=1, max=MAX_INSTANCES, help="number of decode workers")] = None,
    colocated: Annotated[
        int | None, typer.Option(min=1, max=MAX_INSTANCES, help="number of workers that do both")
    ] = None,
    grace: Grace = None,
    timeout: Timeout = 900.0,
    pid: Pid = None,
) -> int:
    """Change the number of workers of the running cluster, and wait until they have joined or left. Workers that leave
    take no new requests and finish those that they have. No request fails. The threads of running workers stay as they
    are."""
    asked = {"prefill": prefill, "decode": decode, "colocated": colocated}
    wanted = {role: number for role, number in asked.items() if number is not None}
    if not wanted:
        raise ConfigError("give at least one of --prefill N, --decode N and --colocated N")
    print_change(ask_controller(find_run(pid), lambda client: client.scale(wanted, grace), timeout))
    return 0

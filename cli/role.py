"""`tandem role`: give a running instance another role."""

from typing import Annotated

import typer

from tandem.cli.common import Pid, Process, Timeout, ask_controller, find_run
from tandem.core.session import Role

EPILOG = """\
examples:
  tandem role prefill-1 decode
  tandem role decode-0 colocated"""


def run(
    process: Process,
    role: Annotated[Role, typer.Argument(help="the role that it gets")],
    timeout: Timeout = 30.0,
    pid: Pid = None,
) -> int:
    """Give a running instance another role, at once and without a restart: requests that it has finish there, and new
    ones follow the new role. It keeps its name, and its role over a restart; `tandem apply` gives it the role of the
    plan again."""
    ask_controller(find_run(pid), lambda client: client.set_role(process, role.value), timeout)
    return 0

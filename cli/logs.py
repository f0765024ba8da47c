"""`tandem logs`: show the log of a process."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.common import Pid, controller_address, find_run
from tandem.cli.output import print_line
from tandem.core.errors import NotFoundError
from tandem.deploy.log_file import folder_logs
from tandem.deploy.run_state import RunState
from tandem.wire.channels import open_channel
from tandem.wire.controller import ControllerClient

EPILOG = """\
examples:
  tandem logs decode-0
  tandem logs router-0 --lines 1000
  tandem logs controller --follow"""
_ANSWER_S = 30.0
_MOST_LINES = 1_000_000
_CONTROLLER = "controller"  # of `tandem up`: a file of this host


def run(
    process: Annotated[str, typer.Argument(help="a process such as decode-0, or `controller` after `tandem up`")],
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, max=_MOST_LINES, help="how many of the last lines")
    ] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until Ctrl-C")] = False,
    pid: Pid = None,
) -> int:
    """Show the last lines of the log of a process, whichever host it runs on. The log goes on when the process is
    started again there. On Kubernetes it is that of the process's pod."""
    cluster = find_run(pid)
    folder = Path(cluster.log_folder) if cluster.log_folder else None
    try:
        if process == _CONTROLLER and folder is not None:
            asyncio.run(_from_file(folder, process, lines, follow))
        else:
            asyncio.run(_from_controller(cluster, process, lines, follow))
    except NotFoundError:
        if folder is None or process not in {path.stem for path in folder.glob("*.log")}:
            raise
        asyncio.run(_from_file(folder, process, lines, follow))  # of a process that the cluster has no more
    return 0


async def _from_file(folder: Path, process: str, lines: int, follow: bool) -> None:
    async for part in folder_logs(folder)(process, lines, follow):
        for line in part:
            print_line(line)


async def _from_controller(cluster: RunState, process: str, lines: int, follow: bool) -> None:
    async with open_channel(controller_address(cluster), cluster.cluster_token, cluster.tls) as channel:
        client = ControllerClient(channel, _ANSWER_S)
        async for part in client.logs(cluster.cluster_token, process, lines, follow=follow):
            for line in part:
                print_line(line)

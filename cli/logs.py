"""`tandem logs`: show the log of a process."""

import time
from collections import deque
from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.common import Pid, find_run
from tandem.cli.output import print_line
from tandem.core.errors import UnavailableError

EPILOG = """\
examples:
  tandem logs decode-0
  tandem logs router-0 --lines 1000
  tandem logs controller --follow"""
_POLL_S = 0.2


def run(
    process: Annotated[str, typer.Argument(help="a process such as decode-0, or `controller` after `tandem up`")],
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="how many of the last lines")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until Ctrl-C")] = False,
    pid: Pid = None,
) -> int:
    """Show the last lines of the log of a process. The log goes on when the process is started again."""
    folder = Path(find_run(pid).log_folder)
    logs = {path.stem: path for path in sorted(folder.glob("*.log"))}
    if process not in logs:
        raise UnavailableError(f"there is no log of '{process}' in {folder}; there is {', '.join(logs) or 'none'}")
    with logs[process].open(errors="replace") as log:
        for line in deque(log, maxlen=lines):
            print_line(line.rstrip("\n"))
        while follow:
            if line := log.readline():
                print_line(line.rstrip("\n"))
                continue
            time.sleep(_POLL_S)
            if log.tell() > logs[process].stat().st_size:  # it was moved away because it was long
                log.seek(0)
    return 0

"""Runs the planner in a separate process for `deploy.replanner`, so that serving is not delayed.

`tandem serve` starts `python -m tandem.deploy.plan_again FOLDER`, which writes result.json to the folder. The process
ends with the task that waits for it, and with its parent process.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tandem.core.errors import InternalError, UnavailableError
from tandem.deploy.replanner import ReplanResult

_RESULT = "result.json"
_LOG = "planner.log"


async def plan_in_process(
    folder: Path, *, arguments: Sequence[str] = ("-m", "tandem.deploy.plan_again")
) -> ReplanResult:
    """A `deploy.replanner.RunPlanner`. `arguments` are Python's, before the folder. Raises UnavailableError when the
    process fails; its log is in the folder."""
    log_path = folder / _LOG
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *arguments, str(folder)),
            stdin=asyncio.subprocess.PIPE,  # never written; its end tells the process that the parent is gone
            stdout=log,
            stderr=log,
            start_new_session=True,  # a process group for the kill below; no Ctrl-C from the terminal
        )
    try:
        status = await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if status != 0:
        raise UnavailableError(f"the planner ended with status {status}; its log is {log_path}")
    return _read_result(folder)


def write_result(folder: Path, result: ReplanResult) -> None:
    (folder / _RESULT).write_text(json.dumps(asdict(result)))


def _read_result(folder: Path) -> ReplanResult:
    """Raises InternalError if there is no valid result."""
    try:
        fields = json.loads((folder / _RESULT).read_text())
        return ReplanResult(**(fields | {"changes": tuple(fields["changes"])}))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InternalError(f"the planner wrote no result to {folder}") from error

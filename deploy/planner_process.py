"""The planner in a process of its own, for `deploy.replanner`: serving must not notice it.

`tandem serve` starts `python -m deploy.plan_again FOLDER`, which leaves answer.json in the folder. The process ends
with the task that waits for it, and when whoever started it is gone.
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
from tandem.deploy.replanner import ReplanAnswer

_ANSWER = "answer.json"
_LOG = "planner.log"


class PlannerProcess:
    """Implements `deploy.replanner.Planner`: one process for each question. `arguments` are Python's, before the
    folder."""

    def __init__(self, arguments: Sequence[str] = ("-m", "tandem.deploy.plan_again")) -> None:
        self._arguments = tuple(arguments)

    async def answer(self, folder: Path) -> ReplanAnswer:
        """Raises UnavailableError when the process fails; its log is in the folder."""
        log_path = folder / _LOG
        with log_path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *self._arguments, str(folder)),
                stdin=asyncio.subprocess.PIPE,  # never written to: its end tells the process that nobody waits
                stdout=log,
                stderr=log,
                start_new_session=True,  # a group for it and what it starts; and Ctrl-C is not for it
            )
        try:
            status = await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if status != 0:
            raise UnavailableError(f"the planner ended with status {status}; its log is {log_path}")
        return read_answer(folder)


def write_answer(folder: Path, answer: ReplanAnswer) -> None:
    (folder / _ANSWER).write_text(json.dumps(asdict(answer)))


def read_answer(folder: Path) -> ReplanAnswer:
    """Raises InternalError if there is none."""
    try:
        fields = json.loads((folder / _ANSWER).read_text())
        return ReplanAnswer(**(fields | {"changes": tuple(fields["changes"])}))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InternalError(f"the planner left no answer in {folder}") from error

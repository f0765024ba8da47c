"""The controller of a cluster that outlives the terminal: `python -m tandem.deploy.controller_process FOLDER`.

    start: lock the folder -> take back what runs -> serve -> bring about what is desired
    SIGTERM, or any other end: the processes go on; the next controller of the folder takes them back
    Stop (ControllerService): stop the processes, clear the folder, end

It ends without closing anything: what must survive is on the disk before it is done.
"""

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from tandem.core.clock import SystemClock
from tandem.core.errors import TandemError
from tandem.core.log_lines import announce, configure_logging
from tandem.deploy.cluster_folder import ClusterFolder
from tandem.deploy.controller_server import serve_controller
from tandem.deploy.desired import Desired
from tandem.deploy.kept_task import cancel, keep
from tandem.deploy.log_file import folder_logs
from tandem.deploy.machine import available_memory_bytes, this_machine
from tandem.deploy.plan_comparison import compare_with_plan
from tandem.deploy.process_launcher import ProcessLauncher
from tandem.deploy.progress import watch_health
from tandem.deploy.run_state import run_state
from tandem.deploy.serving import Serving

log = logging.getLogger(__name__)


def command_of(folder: ClusterFolder) -> list[str]:
    return [sys.executable, "-P", "-m", "tandem.deploy.controller_process", str(folder.path)]


class _State:
    """What the folder says of a running cluster. `controller` is this process's address."""

    def __init__(self, folder: ClusterFolder) -> None:
        self.controller = ""
        self._folder = folder

    async def save(self, desired: Desired) -> None:
        self._folder.save_desired(desired)
        folder = self._folder
        folder.save_run(run_state(desired.config, folder.logs, controller=self.controller, cluster=folder.name))


async def _run(folder: ClusterFolder, desired: Desired) -> None:
    """Until the cluster is stopped. At a SIGTERM this process ends, and the cluster goes on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _leave)
    clock, machine, config, state = SystemClock(), this_machine(), desired.config, _State(folder)
    launcher = ProcessLauncher(
        folder.path,
        folder.logs,
        gpus=machine.gpus,
        load_timeout_s=config.load_timeout_s,
        grace_s=desired.grace_s,
        records=folder.records(),
    )
    logs = folder_logs(folder.logs)
    watch = watch_health(clock)
    serving = Serving(
        desired,
        lambda: machine,
        launcher,
        clock,
        watch,
        save=state.save,
        show=_say,
        read_log=logs,
        available_memory=available_memory_bytes,
    )
    await launcher.start()
    async with serve_controller(serving, config) as state.controller:
        await state.save(desired)
        serving.take_back(launcher.left_running())
        _say(f"the controller serves on {state.controller}; {len(launcher.left_running())} processes were left running")
        helpers = [
            keep("the report of events", serving.say_events, _say),
            keep("the news for processes", serving.tell_processes, _say),
            keep("the care for logs", launcher.bound_logs, _say),
            keep("the start", lambda: _start(serving), _say),
            keep("the comparison with the plan", lambda: compare_with_plan(serving, folder.logs, _say), _say),
        ]
        await serving.has_stopped.wait()
        await cancel(helpers)
    serving.say_last_events()
    await launcher.close()
    folder.clear()


async def _start(serving: Serving) -> None:
    try:
        await serving.start()
        _say("all processes are up")
    except TandemError as error:  # whoever has asked for the start gets it too; what has failed is tried again
        _say(f"not all processes are up: {error.message}")


def _say(line: str) -> None:
    announce(log, line)


def _leave() -> None:
    _say("the controller leaves; its processes go on")
    os._exit(0)


def main() -> int:
    configure_logging("text", "controller")
    folder = ClusterFolder(Path(sys.argv[1]))
    try:
        with folder.lock():
            desired = folder.load_desired()
            if desired is None:
                _say(f"{folder.path} has no cluster")
                return 1
            configure_logging(desired.config.log_format, "controller")
            asyncio.run(_run(folder, desired))
            return 0
    except TandemError as error:
        _say(error.message)
        return 1


if __name__ == "__main__":
    sys.exit(main())

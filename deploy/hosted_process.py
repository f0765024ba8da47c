"""Runs one worker or router in a process of its own: `python -m tandem.deploy.hosted_process SOCKET KEY CONTROLLER`.

A Ray task starts the process in the background of a shell; when the shell has ended, the controller is its parent
(`deploy.child_process`). So it depends on the controller alone, and goes on when Ray dies. They speak over a Unix
socket, one JSON object a line:

    process                       controller
      | -- key -------------------> |
      | <-- class, configuration -- |
      | (import, load)              |
      | -- ready, or an error ----> |
      | -- draining --------------> |   after a SIGTERM
      | <-- grace_s --------------- |   drain within this time, and end
      | -- ended: the reason -----> |

The end of the connection is the end of the controller, and ends the process. Torch reads its thread settings when it is
imported, so they are in the environment before.
"""

import asyncio
import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import uvloop

from tandem.core.config import RouterConfig, WorkerConfig
from tandem.core.errors import InternalError, TandemError
from tandem.core.log_lines import configure_logging
from tandem.core.parent_process import end_with_parent
from tandem.deploy.topology import ProcessSpec

CLOSE_S = 6.0  # after the grace period, to close sockets and free memory
_ADOPTION_S = 10.0
_CONFIGS: Mapping[str, type[RouterConfig] | type[WorkerConfig]] = {
    config.__name__: config for config in (RouterConfig, WorkerConfig)
}


class HostedApp(Protocol):
    """A worker or a router. The constructor's only argument is the configuration."""

    address: str
    instance_id: str

    async def start(self) -> None:
        """Returns when ready to serve. Raises a TandemError."""
        ...

    async def wait_closed(self) -> None:
        """Returns when the application has ended; raises if it failed."""
        ...

    async def drain_and_stop(self, grace_s: float) -> None:
        """Accept no new requests, finish running ones for up to `grace_s`, then end."""
        ...


@dataclass(frozen=True, slots=True)
class StartReport:
    """`error_code` is empty if the application is ready, else a code of `core.errors`."""

    address: str = ""
    instance_id: str = ""
    error_code: str = ""
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a process runs. `grace_s`: how long requests may take after a SIGTERM."""

    name: str
    entry: str
    config: RouterConfig | WorkerConfig
    grace_s: float

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "entry": self.entry,
            "config_class": type(self.config).__name__,
            "config": self.config.model_dump(mode="json"),
            "grace_s": self.grace_s,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Assignment":
        config = _CONFIGS[fields["config_class"]].model_validate(fields["config"])
        return cls(fields["name"], fields["entry"], config, fields["grace_s"])


def command_of(socket_path: str, key: str) -> list[str]:
    """The command of a process that this process, the controller, will be the parent of."""
    return [sys.executable, "-P", "-m", "tandem.deploy.hosted_process", socket_path, key, str(os.getpid())]


def environment_of(spec: ProcessSpec) -> dict[str, str]:
    """Variables for the process: this process's import path, and the numbers of threads."""
    return thread_environment(spec.threads) | import_path()


def import_path() -> dict[str, str]:
    """The variable with which a Python process, started with -P, imports what this one does."""
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def thread_environment(threads: int) -> dict[str, str]:
    """Environment variables that set the number of threads of OpenMP, MKL and the tokenizers library."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class _Controller:
    """The connection to the controller. `stop` has the grace period once the process is told to end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.stop: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._reader, self._writer = reader, writer

    def send(self, **fields: Any) -> None:
        self._writer.write(json.dumps(fields).encode() + b"\n")

    async def flush(self) -> None:
        with contextlib.suppress(OSError):
            await self._writer.drain()
            self._writer.close()
            await self._writer.wait_closed()

    async def receive(self) -> dict[str, Any]:
        """The next message. At the end of the connection this process ends: the controller is gone, or gave it up."""
        line = await self._reader.readline()
        if not line:
            os._exit(1)
        fields: dict[str, Any] = json.loads(line)
        return fields

    async def take_stop(self) -> None:
        while True:
            self.ask_stop((await self.receive())["grace_s"])

    def ask_stop(self, grace_s: float) -> None:
        if not self.stop.done():
            self.stop.set_result(grace_s)

    def on_sigterm(self, grace_s: float) -> None:
        """The first one drains; another one ends the process at once."""
        if self.stop.done():
            os._exit(0)
        self.send(draining=True)
        self.ask_stop(grace_s)


async def _host(socket_path: str, key: str) -> None:
    controller = _Controller(*await asyncio.open_unix_connection(socket_path))
    controller.send(key=key)
    assignment = Assignment.from_json(await controller.receive())
    configure_logging(assignment.config.log_format, assignment.name)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, controller.on_sigterm, assignment.grace_s)
    commands = asyncio.create_task(controller.take_stop(), name="commands")
    commands.add_done_callback(_exit_on_error)
    starting = asyncio.create_task(_start(assignment), name="start")
    await asyncio.wait((starting, controller.stop), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        os._exit(0)  # nothing can interrupt torch or a compiler, and nothing is owed to anybody yet
    app, report = starting.result()
    controller.send(**asdict(report))
    if app is not None:
        controller.send(ended=await _run(app, controller.stop))
    commands.cancel()
    await asyncio.gather(commands, return_exceptions=True)
    await controller.flush()


def _exit_on_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        traceback.print_exception(error)
        os._exit(1)


async def _start(assignment: Assignment) -> tuple[HostedApp | None, StartReport]:
    """The running application; None with an error in the report."""
    try:
        module, _, name = assignment.entry.partition(":")
        app: HostedApp = getattr(importlib.import_module(module), name)(assignment.config)
        await app.start()
        gc.freeze()  # what start-up has made stays; a look at it would stop the event loop for 60 ms
    except TandemError as error:
        traceback.print_exc()
        return None, StartReport(error_code=error.code, error_message=error.message)
    except Exception as error:  # noqa: BLE001 - top level of the process: the controller must get every error
        traceback.print_exc()
        message = f"{assignment.name} could not start ({type(error).__name__}: {error})"
        return None, StartReport(error_code=InternalError.code, error_message=message)
    return app, StartReport(app.address, app.instance_id)


async def _run(app: HostedApp, stop: "asyncio.Future[float]") -> str:
    """Until the application ends, by itself or because of `stop`; returns the reason."""
    closed = asyncio.create_task(app.wait_closed(), name="closed")
    await asyncio.wait((closed, stop), return_when=asyncio.FIRST_COMPLETED)
    try:
        if not closed.done():
            async with asyncio.timeout(stop.result() + CLOSE_S):
                await app.drain_and_stop(stop.result())
            return "it was told to end"
        closed.result()
    except TandemError as error:
        return error.message
    except Exception as error:  # noqa: BLE001 - as above
        traceback.print_exc()
        return f"it failed ({type(error).__name__})"
    finally:
        closed.cancel()
        await asyncio.gather(closed, return_exceptions=True)
    return "it ended by itself"


def main() -> int:
    socket_path, key, controller_pid = sys.argv[1:]
    if not end_with_parent(int(controller_pid), _ADOPTION_S):
        return 1
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_host(socket_path, key))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs one worker or router in a process of its own: `python -m tandem.deploy.hosted_process SOCKET KEY CONTROLLER`.

A launcher starts the process in the background of a shell; when the shell has ended, the controller is its parent
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

The end of the connection is the end of the controller, and ends the process. A process with `outlives` goes on once it
is ready, and returns to the next controller, which listens on the same socket (decision 0017):

      | -- key, returns ----------> |
      | <-- taken, or forgotten --- |   a process that the controller does not know drains, and ends

It also drains and ends when the folder of the socket is gone: nobody will take it back. Torch reads its thread settings
when it is imported, so they are in the environment before.
"""

import asyncio
import contextlib
import gc
import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import uvloop

from tandem.core.config import RouterConfig, WorkerConfig
from tandem.core.errors import InternalError, TandemError
from tandem.core.log_lines import configure_logging
from tandem.core.other_versions import read_known
from tandem.core.parent_process import end_with_parent, outlive_parent
from tandem.deploy.topology import ProcessSpec

CLOSE_S = 6.0  # after the grace period, to close sockets and free memory
_ADOPTION_S = 10.0
_RETURN_S = 0.25  # between two tries to reach the next controller
_CONFIGS: Mapping[str, type[RouterConfig] | type[WorkerConfig]] = {
    config.__name__: config for config in (RouterConfig, WorkerConfig)
}


log = logging.getLogger(__name__)


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
    """What a process runs. `grace_s`: how long requests may take after a SIGTERM. `outlives`: once ready, it goes on
    when its controller ends."""

    name: str
    entry: str
    config: RouterConfig | WorkerConfig
    grace_s: float
    outlives: bool = False

    def to_json(self) -> dict[str, Any]:
        config = {"config_class": type(self.config).__name__, "config": self.config.model_dump(mode="json")}
        return {
            "name": self.name,
            "entry": self.entry,
            "grace_s": self.grace_s,
            "outlives": self.outlives,
        } | config

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Assignment":
        config = config_from_json(fields)
        return cls(fields["name"], fields["entry"], config, fields["grace_s"], fields["outlives"])


def config_from_json(fields: Mapping[str, Any]) -> RouterConfig | WorkerConfig:
    """Of `config_class` and `config`, as `Assignment.to_json` writes them, maybe that of another version."""
    return read_known(_CONFIGS[fields["config_class"]], fields["config"])


def command_of(socket_path: Path, key: str) -> list[str]:
    """The command of a process that this process, the controller, will be the parent of. `key` tells processes apart;
    it is no secret, the socket's folder is this user's alone."""
    return [sys.executable, "-P", "-m", "tandem.deploy.hosted_process", str(socket_path), key, str(os.getpid())]


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

    def __init__(self, socket_path: Path, key: str) -> None:
        self.stop: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._socket_path, self._key = socket_path, key
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._grace_s = 0.0
        self._outlives = False

    async def connect(self) -> Assignment:
        await self._open()
        self.send(key=self._key)
        return Assignment.from_json(await self._receive())

    def outlive(self, grace_s: float) -> None:
        """From now on this process does not end with the controller, but returns to the next one. `grace_s`: of the
        drain when nobody takes it back."""
        self._outlives, self._grace_s = True, grace_s
        outlive_parent()

    def send(self, **fields: Any) -> None:
        assert self._writer is not None, "connect first"
        if not self._writer.is_closing():
            self._writer.write(json.dumps(fields).encode() + b"\n")

    async def flush(self) -> None:
        assert self._writer is not None, "connect first"
        with contextlib.suppress(OSError):
            await self._writer.drain()
            self._writer.close()
            await self._writer.wait_closed()

    async def take_stop(self) -> None:
        while True:
            self.ask_stop((await self._receive())["grace_s"])

    def ask_stop(self, grace_s: float) -> None:
        if not self.stop.done():
            self.stop.set_result(grace_s)

    def on_sigterm(self, grace_s: float) -> None:
        """The first one drains; another one ends the process at once."""
        if self.stop.done():
            os._exit(0)
        self.send(draining=True)
        self.ask_stop(grace_s)

    async def _open(self) -> None:
        self._reader, self._writer = await asyncio.open_unix_connection(self._socket_path)

    async def _receive(self) -> dict[str, Any]:
        """The next message. At the end of the connection this process ends, or returns to the next controller: this one
        is gone, or gave it up."""
        while (message := await self._read()) is None:
            if not self._outlives:
                os._exit(1)
            await self._return()
        return message

    async def _read(self) -> dict[str, Any] | None:
        assert self._reader is not None, "connect first"
        line = b""
        with contextlib.suppress(OSError):
            line = await self._reader.readline()
        if not line.endswith(b"\n"):  # the controller has ended, perhaps in the middle of a message
            return None
        fields: dict[str, Any] = json.loads(line)
        return fields

    async def _return(self) -> None:
        """Until a controller has taken this process back, or it is to end."""
        log.info("the controller is gone; this process goes on")
        assert self._writer is not None, "connect first"
        self._writer.close()
        while True:
            await asyncio.sleep(_RETURN_S)
            if not self._socket_path.parent.exists():
                log.warning("%s is gone, and nobody takes this process back: it ends", self._socket_path.parent)
                break
            try:
                await self._open()
            except OSError:
                continue
            self.send(key=self._key, returns=True)
            answer = await self._read()
            if answer is not None and "taken" in answer:
                log.info("another controller has taken this process back")
                if self.stop.done():
                    self.send(draining=True)
                return
            if answer is not None:
                log.warning("the controller does not know this process: it ends")
                break
        self.ask_stop(self._grace_s)
        await asyncio.Event().wait()  # until the process has ended


async def _host(socket_path: Path, key: str) -> None:
    controller = _Controller(socket_path, key)
    assignment = await controller.connect()
    configure_logging(assignment.config.log_format, assignment.name)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, controller.on_sigterm, assignment.grace_s)
    commands = asyncio.create_task(controller.take_stop(), name="commands")
    commands.add_done_callback(_exit_on_error)
    starting = asyncio.create_task(_start(assignment), name="start")
    await asyncio.wait((starting, controller.stop), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        os._exit(0)  # nothing can interrupt torch or a compiler, and nothing is owed to anybody yet
    app, report = starting.result()
    if app is not None and assignment.outlives:
        controller.outlive(assignment.grace_s)
    controller.send(**asdict(report))
    if app is not None:
        controller.send(ended=await _run(app, controller.stop))
    commands.cancel()
    await asyncio.gather(commands, return_exceptions=True)
    await controller.flush()


def _exit_on_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("the process ends with an error", exc_info=error)
        os._exit(1)


async def _start(assignment: Assignment) -> tuple[HostedApp | None, StartReport]:
    """The running application; None with an error in the report."""
    try:
        module, _, name = assignment.entry.partition(":")
        app: HostedApp = getattr(importlib.import_module(module), name)(assignment.config)
        await app.start()
        gc.freeze()  # what start-up has made stays; a look at it would stop the event loop for 60 ms
    except TandemError as error:
        log.exception("%s could not start", assignment.name)
        return None, StartReport(error_code=error.code, error_message=error.message)
    except Exception as error:  # top level of the process: the controller must get every error
        log.exception("%s could not start", assignment.name)
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
    except Exception as error:  # as above
        log.critical("the process ends with an error", exc_info=error)
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
        runner.run(_host(Path(socket_path), key))
    return 0


if __name__ == "__main__":
    sys.exit(main())

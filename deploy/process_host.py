"""What runs inside each Ray actor: one worker or router, from its start to its end.

Torch reads its thread settings when it is imported, so the host sets them first and imports the application afterwards.
"""

import asyncio
import importlib
import logging
import os
import traceback
from dataclasses import dataclass
from typing import Protocol

from tandem.core.errors import InternalError, TandemError
from tandem.deploy.topology import ProcessSpec

_CLOSE_S = 6.0  # beyond its grace, for closing sockets and giving memory back


class HostedApp(Protocol):
    """A worker or a router as the host sees it; built with its configuration alone."""

    address: str
    instance_id: str

    async def start(self) -> None:
        """Returns when ready to serve. Raises a TandemError."""
        ...

    async def wait_closed(self) -> None:
        """Returns when it has ended, however it came to that; raises if it failed."""
        ...

    async def drain_and_stop(self, grace_s: float) -> None:
        """Take nothing new, finish what there is for `grace_s` at most, then end."""
        ...


@dataclass(frozen=True, slots=True)
class StartReport:
    """`error_code` is empty when the application is ready; else it is one of `core.errors`."""

    pid: int
    address: str = ""
    instance_id: str = ""
    error_code: str = ""
    error_message: str = ""


class ProcessHost:
    """A Ray actor. Nothing happens before `start`."""

    def __init__(self) -> None:
        self._app: HostedApp | None = None

    async def start(self, spec: ProcessSpec, log_path: str) -> StartReport:
        """Run the application of `spec` with everything it prints in `log_path`. Errors come back as values."""
        _log_to(log_path)
        os.environ.update(thread_environment(spec.threads))
        try:
            module, _, name = spec.entry.partition(":")
            app: HostedApp = getattr(importlib.import_module(module), name)(spec.config)
            await app.start()
        except TandemError as error:
            traceback.print_exc()
            return StartReport(os.getpid(), error_code=error.code, error_message=error.message)
        except Exception as error:  # noqa: BLE001 - the process's door: whatever it is, the supervisor must hear of it
            traceback.print_exc()
            message = f"{spec.name} could not start ({type(error).__name__}: {error})"
            return StartReport(os.getpid(), error_code=InternalError.code, error_message=message)
        self._app = app
        return StartReport(os.getpid(), address=app.address, instance_id=app.instance_id)

    async def wait_closed(self) -> str:
        """Wait for the application's end; why it ended."""
        assert self._app is not None, "started before it is waited for"
        try:
            await self._app.wait_closed()
        except TandemError as error:
            return error.message
        except Exception as error:  # noqa: BLE001 - the process's door, as above
            traceback.print_exc()
            return f"it failed ({type(error).__name__})"
        return "it ended by itself"

    async def stop(self, grace_s: float) -> None:
        if self._app is not None:
            async with asyncio.timeout(grace_s + _CLOSE_S):
                await self._app.drain_and_stop(grace_s)


def thread_environment(threads: int) -> dict[str, str]:
    """The variables by which OpenMP, MKL and the tokenizers library learn how many threads they may use."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _log_to(path: str) -> None:
    """Everything this process prints from here on, C libraries' words included, goes to the end of `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)

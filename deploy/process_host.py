"""Runs one worker or router inside a Ray actor.

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

_CLOSE_S = 6.0  # after the grace period, to close sockets and free memory


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

    pid: int
    address: str = ""
    instance_id: str = ""
    error_code: str = ""
    error_message: str = ""


class ProcessHost:
    """A Ray actor. The constructor does no work."""

    def __init__(self) -> None:
        self._app: HostedApp | None = None

    async def start(self, spec: ProcessSpec, log_path: str) -> StartReport:
        """Start the application of `spec`, with its output in `log_path`. Errors are returned as values."""
        _log_to(log_path)
        os.environ.update(thread_environment(spec.threads))
        try:
            module, _, name = spec.entry.partition(":")
            app: HostedApp = getattr(importlib.import_module(module), name)(spec.config)
            await app.start()
        except TandemError as error:
            traceback.print_exc()
            return StartReport(os.getpid(), error_code=error.code, error_message=error.message)
        except Exception as error:  # noqa: BLE001 - top level of the process: the controller must get every error
            traceback.print_exc()
            message = f"{spec.name} could not start ({type(error).__name__}: {error})"
            return StartReport(os.getpid(), error_code=InternalError.code, error_message=message)
        self._app = app
        return StartReport(os.getpid(), address=app.address, instance_id=app.instance_id)

    async def wait_closed(self) -> str:
        """Wait for the application's end; returns the reason."""
        assert self._app is not None, "start first"
        try:
            await self._app.wait_closed()
        except TandemError as error:
            return error.message
        except Exception as error:  # noqa: BLE001 - as above
            traceback.print_exc()
            return f"it failed ({type(error).__name__})"
        return "it ended by itself"

    async def stop(self, grace_s: float) -> None:
        if self._app is not None:
            async with asyncio.timeout(grace_s + _CLOSE_S):
                await self._app.drain_and_stop(grace_s)


def thread_environment(threads: int) -> dict[str, str]:
    """Environment variables that set the number of threads of OpenMP, MKL and the tokenizers library."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _log_to(path: str) -> None:
    """From now on, append all output of this process to `path`, including the output of C libraries."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)

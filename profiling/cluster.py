"""Starts and stops Tandem processes for measurements: a router, and a worker of each role."""

import asyncio
import os
import secrets
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from tandem.client import AsyncClient
from tandem.core.owned_folder import OwnedFolder
from tandem.core.session import Role
from tandem.profiling.errors import MeasurementError

MODEL_NAME = "measured"
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class StartedProcess:
    """A running process, and the first lines that it printed."""

    process: asyncio.subprocess.Process
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StartedRouter:
    """A running router. Addresses are host:port."""

    process: StartedProcess
    http: str
    grpc: str
    control: str


class ClusterLauncher:
    """Starts processes on free ports of this machine, and stops them all when its block is left.

    Configuration files and logs lie in a temporary folder, where the processes also start, so that no folder of the
    caller's can hide an installed package. `checkout`: start them there instead, which runs the code that lies there.
    """

    def __init__(self, model: Path, *, checkout: Path | None = None) -> None:
        self.cluster_token = secrets.token_hex(16)
        self._model = model.resolve()
        self._checkout = checkout
        self._resources = AsyncExitStack()
        self._folder = Path()

    async def __aenter__(self) -> Self:
        folder = OwnedFolder.make("profile")
        self._resources.callback(folder.remove)
        self._folder = folder.path
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._resources.aclose()

    async def start_router(self, settings: Mapping[str, object] | None = None) -> StartedRouter:
        """`settings` are those of the section `router`. Raises MeasurementError."""
        return await self.start_router_module("tandem.router", self._checkout, settings)

    async def start_workers(
        self, router: StartedRouter, engine: Mapping[str, object], instance: Mapping[str, object] | None = None
    ) -> dict[Role, StartedProcess]:
        """A prefill and a decode worker with the settings `engine` and other settings `instance`, once the router has
        sessions with both. Raises MeasurementError."""
        started = {
            role: await self._start_worker(role, f"tandem.{role.value}_worker", router, engine, instance or {})
            for role in (Role.PREFILL, Role.DECODE)
        }
        await wait_until_ready(router)
        return started

    async def start_colocated(self, router: StartedRouter, engine: Mapping[str, object]) -> StartedProcess:
        """One colocated instance, of as many ranks as its settings say, once the router has a session with it. Raises
        MeasurementError."""
        started = await self._start_worker(Role.COLOCATED, "tandem.worker", router, engine, {})
        await wait_until_ready(router)
        return started

    async def _start_worker(
        self,
        role: Role,
        module: str,
        router: StartedRouter,
        engine: Mapping[str, object],
        instance: Mapping[str, object],
    ) -> StartedProcess:
        settings = {"role": role.value, "routers": [router.control], "instance": {**instance, "engine": dict(engine)}}
        return await self.start(module, *self._write_config(role.value, settings), num_lines=1)

    async def start_router_module(
        self, module: str, checkout: Path | None, settings: Mapping[str, object] | None = None
    ) -> StartedRouter:
        """`module`: the router's name in that checkout. Raises MeasurementError."""
        free = "127.0.0.1:0"
        section = {"http": free, "grpc": free, "control": free, **(settings or {})}
        config = self._write_config("router", {"router": section})
        process = await self.start(module, *config, num_lines=3, checkout=checkout)
        http, grpc, control = (line.split()[-1].removeprefix("http://") for line in process.lines)
        return StartedRouter(process, http, grpc, control)

    async def start(
        self, module: str, *arguments: str, num_lines: int = 0, checkout: Path | None = None
    ) -> StartedProcess:
        """Start `python -m module`, and wait until it has printed `num_lines` lines. Raises MeasurementError."""
        log = self._folder / f"{module}.log"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._resources.enter_context(log.open("wb")),
            cwd=checkout or self._checkout or self._folder,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self._resources.push_async_callback(_stop, process)
        assert process.stdout is not None
        lines: list[str] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(_START_TIMEOUT_S):
                while len(lines) < num_lines and all(lines):
                    lines.append((await process.stdout.readline()).decode().strip())
        if len(lines) < num_lines or not all(lines):
            last = log.read_text().strip().rpartition("\n")[2]
            raise MeasurementError(f"{module} did not start: {last}")
        return StartedProcess(process, tuple(lines))

    def _write_config(self, name: str, settings: Mapping[str, Any]) -> tuple[str, str]:
        path = self._folder / f"{name}.yaml"
        common = {"model": str(self._model), "model_name": MODEL_NAME, "cluster_token": self.cluster_token}
        path.write_text(yaml.safe_dump({**common, **settings}))
        return "--config", str(path)


async def wait_until_ready(router: StartedRouter) -> None:
    """Until the router has sessions with a worker of each role. Raises MeasurementError."""
    client = AsyncClient(router.grpc)
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not (await client.models())[0].max_model_len:  # noqa: ASYNC110 - another process decides
                await asyncio.sleep(0.1)
    except TimeoutError as error:
        raise MeasurementError("the workers did not report to the router") from error
    finally:
        await client.close()


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Closes the standard input, which some processes wait for, and sends SIGTERM."""
    assert process.stdin is not None
    process.stdin.close()
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()

"""Processes of the house under measurement: started with free ports, asked for the CPU time they used, and ended."""

import asyncio
import os
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import yaml

from tandem.client import AsyncClient
from tandem.core.session import InstanceStatus, Role
from tandem.wire.channels import open_channel
from tandem.wire.fleet import describe_fleet

MODEL_NAME = "measured"
CLUSTER_TOKEN = "bench-token"
HEARTBEAT_S = 0.5  # as workers have it when nothing is set
_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 20.0


class BenchError(Exception):
    """What is to be measured did not start, or did not answer as it should. One sentence."""


@dataclass(frozen=True, slots=True)
class Process:
    """A running process of ours."""

    process: asyncio.subprocess.Process
    lines: tuple[str, ...]  # the first it said

    def cpu_s(self) -> float:
        """CPU time of all its threads so far, user and system."""
        cpu_clock = (~self.process.pid << 3) | 2  # what clock_getcpuclockid(3) computes
        return time.clock_gettime(cpu_clock)

    def cpu_s_by_thread(self) -> dict[int, float]:
        """CPU time of each thread that lives now; the main thread has the process's id."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        return {int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks.iterdir()}


@dataclass(frozen=True, slots=True)
class Router:
    process: Process
    http: str  # host:port, like the others
    grpc: str
    control: str

    async def instances(self) -> tuple[InstanceStatus, ...]:
        async with open_channel(self.control, CLUSTER_TOKEN) as channel:
            return (await describe_fleet(channel, timeout_s=10.0)).instances


class Launcher:
    """Starts processes, and ends them all when its block is left. Their logs go to a folder of their own."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._resources = AsyncExitStack()
        self._folder = Path()

    async def __aenter__(self) -> Self:
        self._folder = Path(self._resources.enter_context(TemporaryDirectory(prefix="tandem-bench-")))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._resources.aclose()

    async def router(self, root: Path | None = None) -> Router:
        """Of the checkout in the folder `root`, or else of this one."""
        free = "127.0.0.1:0"
        config = {"router": {"http": free, "grpc": free, "control": free}}
        process = await self._start("router", self._config("router", config), num_lines=3, root=root)
        http, grpc, control = (line.split()[-1].removeprefix("http://") for line in process.lines)
        return Router(process, http, grpc, control)

    async def scripted_workers(self, router: Router, step_s: float) -> Process:
        arguments = (router.control, MODEL_NAME, CLUSTER_TOKEN, str(step_s))
        process = await self._start("bench.scripted_workers", arguments)
        await _wait_until_ready(router)
        return process

    async def workers(self, router: Router, engine: Mapping[str, object] | None = None) -> dict[Role, Process]:
        """A prefill and a decode worker, ready. `engine`: settings of both (default: one thread, little memory)."""
        started = {}
        for role in Role:
            section = {"engine": dict(engine or {"threads": 1, "kv_memory": "256MiB"})}
            config = {"routers": [router.control], "heartbeat_s": HEARTBEAT_S, role.value: section}
            module = f"{role.value}_worker"
            started[role] = await self._start(module, self._config(module, config), num_lines=1)
        await _wait_until_ready(router)
        return started

    def _config(self, name: str, settings: dict[str, Any]) -> tuple[str, str]:
        path = self._folder / f"{name}.yaml"
        common = {"model": str(self._model.resolve()), "model_name": MODEL_NAME, "cluster_token": CLUSTER_TOKEN}
        path.write_text(yaml.safe_dump(common | settings))
        return "--config", str(path)

    async def _start(
        self, module: str, arguments: tuple[str, ...], num_lines: int = 0, root: Path | None = None
    ) -> Process:
        log = self._folder / f"{module}.log"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._resources.enter_context(log.open("wb")),
            cwd=root,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self._resources.push_async_callback(_end, process)
        assert process.stdout is not None
        lines = []
        async with asyncio.timeout(_START_TIMEOUT_S):
            for _ in range(num_lines):
                lines.append((await process.stdout.readline()).decode().strip())
        if not all(lines):
            last = log.read_text().strip().rpartition("\n")[2]
            raise BenchError(f"{module} did not start: {last}")
        return Process(process, tuple(lines))


async def _wait_until_ready(router: Router) -> None:
    """Until the router has sessions with a pair of workers."""
    client = AsyncClient(router.grpc)
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not (await client.models())[0].max_model_len:  # noqa: ASYNC110 - another process says it
                await asyncio.sleep(0.1)
    except TimeoutError as error:
        raise BenchError("the workers did not report to the router") from error
    finally:
        await client.close()


async def _end(process: asyncio.subprocess.Process) -> None:
    """By the end of its input, which scripted workers wait for, and by SIGTERM."""
    assert process.stdin is not None
    process.stdin.close()
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(_END_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()

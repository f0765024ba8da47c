"""The parent of one process on a node of a Ray cluster. `deploy.ray_node_launcher` makes a Ray actor of it.

    actor starts --start(spec)--> process loads --ready--> runs --ended, stalled, stop, kill--> ended

The process is a child of the actor, as those of `tandem serve` are its children, and the kernel ends it with the actor.
So a process lives no longer than what Ray holds for it, and a node that leaves the cluster leaves nothing behind.
"""

import asyncio
import contextlib
import logging
import os
import socket
from dataclasses import dataclass, replace

from tandem.core.address import advertised, is_loopback
from tandem.core.clock import SystemClock
from tandem.core.config import WorkerConfig
from tandem.core.errors import TandemError
from tandem.core.owned_folder import OwnedFolder
from tandem.deploy.log_file import LogPart, read_log
from tandem.deploy.process_launcher import ProcessLauncher
from tandem.deploy.progress import watch_health
from tandem.deploy.ray_cluster import import_ray
from tandem.deploy.run_state import StateFolders
from tandem.deploy.running_process import ProcessEnd, ProcessInfo, RunningProcess
from tandem.deploy.supervisor import wait_end
from tandem.deploy.topology import RANKS_ENTRY, ProcessSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostReport:
    """What has become of a start. `host` and `node_id` tell where; `info` is None with an error."""

    host: str
    node_id: str
    info: ProcessInfo | None = None
    error_code: str = ""
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class HostSettings:
    """`run` names the folder of logs on each host; times in seconds, as `ProcessLauncher` has them."""

    run: str
    load_timeout_s: float
    grace_s: float


def read_log_here(run: str, process: str, num_past: int, position: int | None) -> LogPart:
    """On the host where it runs, as `read_log`."""
    return read_log(StateFolders.of_environment(os.environ).logs / run, process, num_past, position)


class ProcessHost:
    """Its methods are called over Ray. One process, started once; all but `start` may be called again."""

    def __init__(self, settings: HostSettings) -> None:
        ray = import_ray()
        self.spec: ProcessSpec | None = None
        self._settings = settings
        self._host: str = ray.util.get_node_ip_address()
        self._report = HostReport(self._host, ray.get_runtime_context().get_node_id())
        self._folder: OwnedFolder | None = None
        self._launcher: ProcessLauncher | None = None
        self._process: RunningProcess | None = None
        self._end: asyncio.Task[ProcessEnd] | None = None
        self._logs: asyncio.Task[None] | None = None

    async def find_address(self) -> str:
        """Of this host, with a port that is free now."""
        with socket.create_server((self._host, 0)) as probe:
            return advertised(f"0.0.0.0:{probe.getsockname()[1]}", self._host)

    async def start(self, spec: ProcessSpec, model_hash: str | None) -> HostReport:
        """Returns when the process is ready, or could not be started. `model_hash`: of the cluster's model files, where
        `spec` names none."""
        folders = StateFolders.of_environment(os.environ)
        log_folder = folders.logs / self._settings.run
        log_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = OwnedFolder.make("host")
        launcher = self._launcher = ProcessLauncher(
            self._folder.path / "p",
            log_folder,
            load_timeout_s=self._settings.load_timeout_s,
            grace_s=self._settings.grace_s,
        )
        here = spec_on_host(spec, self._host, model_hash)
        try:
            await launcher.start()
            process = await launcher.launch(here)
        except TandemError as error:
            await self._clear_away()
            return replace(self._report, error_code=error.code, error_message=error.message)
        self.spec, self._process = spec, process
        self._report = replace(self._report, info=process.info)
        # Ranks of an instance whose rank 0 is elsewhere have no port: rank 0 watches them.
        watch = None if spec.entry == RANKS_ENTRY else watch_health(SystemClock())
        self._end = asyncio.create_task(wait_end(here, process, watch), name="end")
        self._logs = asyncio.create_task(launcher.bound_logs(), name="care for logs")
        return self._report

    async def describe(self) -> tuple[ProcessSpec | None, HostReport]:
        """What runs here, as the controller has asked for it; None before it is ready."""
        return self.spec, self._report

    async def wait_ended(self) -> ProcessEnd:
        """Returns when the process has ended, or makes no progress."""
        assert self._end is not None, "start it first"
        return await asyncio.shield(self._end)

    async def is_draining(self) -> bool:
        """Also the sign of life that the controller waits for."""
        return self._process is not None and self._process.is_draining

    async def stop(self, grace_s: float) -> None:
        if self._process is not None:
            await self._process.stop(grace_s)

    async def kill(self) -> None:
        """End the process, and remove what it needed."""
        for task in (self._logs, self._end):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._process is not None:
            await self._process.kill()
        await self._clear_away()

    async def _clear_away(self) -> None:
        launcher, self._launcher = self._launcher, None
        if launcher is not None:
            with contextlib.suppress(OSError):
                await launcher.close()
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.remove()


def spec_on_host(spec: ProcessSpec, host: str, model_hash: str | None) -> ProcessSpec:
    """The process as it runs on `host`: others reach it there, and its devices are those that Ray has given to its
    parent."""
    config = spec.config
    if isinstance(config, WorkerConfig):
        listen = advertised(config.listen, host) if is_loopback(config.listen) else config.listen
        config = config.model_copy(update={"listen": listen, "model_hash": config.model_hash or model_hash})
    return replace(spec, config=config, gpus=0.0)

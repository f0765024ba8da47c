"""Starts processes where Ray places them, and keeps Ray itself running.

Ray reserves each process's resources and starts it; then the process belongs to this one (`deploy.hosted_process`), and
Ray's death ends none. Ray restarts nothing: the controller replaces an instance as a whole.
"""

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tandem.core.clock import Clock
from tandem.core.errors import UnavailableError
from tandem.deploy import ray_process
from tandem.deploy.child_process import ChildProcess, kill_all, processes_that_use
from tandem.deploy.hosted_process import command_of, environment_of, import_path
from tandem.deploy.launched_process import Connection, LaunchedProcess
from tandem.deploy.process_launcher import ProcessLauncher
from tandem.deploy.process_records import ProcessRecord
from tandem.deploy.ray_cluster import PROCESS_RESOURCE
from tandem.deploy.topology import ProcessSpec

_RAY_START_S = 180.0
_RAY_STOP_S = 10.0
_PLACEMENT_S = 30.0
_LONGEST_PAUSE_S = 30.0


class Ray:
    """One Ray, from its start to its end, in a process beside this one. `folder` must not exist."""

    def __init__(self, folder: Path, log_path: Path) -> None:
        self.folder = folder
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._log_path = log_path
        self._process: asyncio.subprocess.Process | None = None
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._family: list[psutil.Process] = []

    async def start(self, gpus: int) -> None:
        """Raises UnavailableError. Call `stop` afterwards in any case."""
        with self._log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *ray_process.command_of(self.folder, gpus),
                env=os.environ | import_path(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(_RAY_START_S):
                message = await self._receive()
        except TimeoutError:
            message = {"error": f"Ray did not start within {_RAY_START_S:g} s"}
        if message is None or "error" in message:
            text = "Ray ended while it started" if message is None else str(message["error"]).partition("\n")[0]
            raise UnavailableError(f"{text}; its log is {self._log_path}")
        self._family = psutil.Process(self._process.pid).children(recursive=True)
        self._reading = asyncio.create_task(self._take_answers(), name="answers of Ray")

    async def spawn(
        self, key: str, bundle: dict[str, float], command: list[str], environment: dict[str, str], log_path: str
    ) -> tuple[int, list[int | str]]:
        """Start a process; returns its pid, and the devices that it has. An empty command only reserves. Raises
        UnavailableError, and TimeoutError where Ray does not answer. `release` the key afterwards in any case."""
        self._answers[key] = answer = asyncio.get_running_loop().create_future()
        try:
            request = {"key": key, "bundle": bundle, "command": command, "environment": environment}
            self._send(request | {"log_path": log_path})
            async with asyncio.timeout(_PLACEMENT_S):
                await asyncio.wait((answer, self.failed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._answers[key]
        if not answer.done():
            raise UnavailableError(f"Ray ended meanwhile ({self.failed.result()})")
        if "error" in answer.result():
            raise UnavailableError(f"Ray could not start it ({answer.result()['error']})")
        return answer.result()["pid"], answer.result()["devices"]

    def release(self, key: str) -> None:
        """Give back what Ray holds for a process that has ended."""
        self._send({"release": key})

    async def stop(self) -> None:
        """End all its processes, and remove its folder."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            if self._reading is not None and not self.failed.done():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_RAY_STOP_S):
                        await self._process.wait()
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
            await self._process.wait()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        await asyncio.to_thread(self._clear)

    def _clear(self) -> None:
        kill_all({*self._family, *processes_that_use(self.folder)})
        shutil.rmtree(self.folder, ignore_errors=True)

    def _send(self, fields: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        if not self.failed.done():
            self._process.stdin.write(json.dumps(fields).encode() + b"\n")

    async def _receive(self) -> dict[str, Any] | None:
        """The next message; None after the end of the process."""
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        fields: dict[str, Any] | None = json.loads(line) if line else None
        return fields

    async def _take_answers(self) -> None:
        while (message := await self._receive()) is not None and "failed" not in message:
            answer = self._answers.get(message["key"])
            if answer is not None and not answer.done():
                answer.set_result(message)
        self.fail("its client ended" if message is None else message["failed"])

    def fail(self, reason: str) -> None:
        if not self.failed.done():
            self.failed.set_result(reason)


class RayLauncher(ProcessLauncher):
    """As `ProcessLauncher`, but Ray chooses the devices, and starts the processes. Ray's files are in `folder`."""

    def __init__(
        self,
        folder: Path,
        log_folder: Path,
        clock: Clock,
        *,
        gpus: int = 0,
        load_timeout_s: float = 900.0,
        grace_s: float = 10.0,
    ) -> None:
        super().__init__(folder, log_folder, load_timeout_s=load_timeout_s, grace_s=grace_s)
        self._clock = clock
        self._gpus = gpus
        self._placed: dict[str, _Placed] = {}  # by key
        self._starts = 0
        self._ray = self._new_ray()
        self._is_up = asyncio.Event()

    async def start(self) -> None:
        """Start Ray, which takes some seconds. Raises UnavailableError. Call `close` afterwards in any case."""
        await super().start()
        await self._ray.start(self._gpus)
        self._is_up.set()

    async def close(self) -> None:
        """End Ray and remove its files. The processes must have ended."""
        await self._ray.stop()
        await super().close()

    def _new_ray(self) -> Ray:
        self._starts += 1
        return Ray(self._folder / str(self._starts), self.log_folder / "ray.log")

    # --- processes ---------------------------------------------------------------------------------------------------

    async def _spawn(self, key: str, spec: ProcessSpec, log_path: str) -> tuple[int, list[int | str]]:
        await self._is_up.wait()
        bundle, command = _bundle(spec), command_of(self._socket_path, key)
        ray = self._ray
        try:
            pid, devices = await ray.spawn(key, bundle, command, environment_of(spec), log_path)
        except TimeoutError as error:
            if not spec.gpus:  # there is always room for a process without a device
                ray.fail(f"it did not start {spec.name} within {_PLACEMENT_S:g} s")
            raise UnavailableError(f"Ray has no resources for {spec.name}, which needs {bundle}") from error
        if devices:
            self._placed[key] = _Placed(bundle, devices)
        return pid, devices

    def _hosted(self, record: ProcessRecord, child: ChildProcess, connection: Connection) -> LaunchedProcess:
        process = super()._hosted(record, child, connection)
        if record.key in self._placed:
            self._placed[record.key].process = process
        return process

    def _release(self, key: str) -> None:
        self._placed.pop(key, None)
        self._ray.release(key)

    # --- Ray ---------------------------------------------------------------------------------------------------------

    async def keep_ray(self, notify: Callable[[str], None]) -> None:
        """Until cancelled: start a new Ray when this one has failed. `notify` gets a line about each event."""
        while True:
            reason, pause_s, began_s = await asyncio.shield(self._ray.failed), 1.0, self._clock.now_s()
            notify(f"Ray: {reason}; starting it again, while all processes go on")
            self._is_up.clear()
            while True:
                await self._ray.stop()
                self._ray = self._new_ray()
                try:
                    await self._ray.start(self._gpus)
                    break
                except (UnavailableError, OSError) as error:
                    notify(f"Ray: {error}; trying again in {pause_s:.0f} s, while all processes go on")
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            await self._reserve_again()
            self._is_up.set()
            notify(f"Ray: up again in {self._clock.now_s() - began_s:.1f} s")

    async def _reserve_again(self) -> None:
        """The new Ray has to know which devices are taken. A process whose device it gives to another is replaced."""
        for key, placed in list(self._placed.items()):
            if placed.process is None:
                continue
            try:
                _, devices = await self._ray.spawn(key, placed.bundle, [], {}, "")
            except (TimeoutError, UnavailableError):
                devices = []
            if devices != placed.devices:
                placed.process.condemn("the new Ray has chosen its device for another process")


@dataclass(slots=True)
class _Placed:
    """A process with devices that Ray has chosen, by number or name. `process` is None while it starts."""

    bundle: dict[str, float]
    devices: list[int | str]
    process: LaunchedProcess | None = None


def _bundle(spec: ProcessSpec) -> dict[str, float]:
    return {PROCESS_RESOURCE: 1.0} | ({"GPU": spec.gpus} if spec.gpus else {})

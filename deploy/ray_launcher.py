"""Starts processes where Ray places them, and keeps Ray itself running.

Ray reserves each process's resources and starts it; then the process belongs to this one (`deploy.hosted_process`), and
Ray's death ends none. Ray restarts nothing: the controller replaces an instance as a whole.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tandem.core.clock import Clock
from tandem.core.errors import InternalError, TandemError, UnavailableError, error_from_code
from tandem.deploy import ray_process
from tandem.deploy.child_process import ChildProcess, adopt_orphans, kill_all, processes_that_use
from tandem.deploy.controller import ProcessEnd, ProcessInfo, RunningProcess
from tandem.deploy.hosted_process import (
    CLOSE_S,
    Assignment,
    StartReport,
    command_of,
    environment_of,
    import_path,
)
from tandem.deploy.ray_cluster import PROCESS_RESOURCE
from tandem.deploy.topology import ProcessSpec

_RAY_START_S = 180.0
_RAY_STOP_S = 10.0
_PLACEMENT_S = 30.0
_STOP_MARGIN_S = CLOSE_S + 2.0  # longer than a process needs to close, so that it can end by itself
_EXIT_S = 2.0  # from its last message to its end
_LONGEST_PAUSE_S = 30.0
_LOG_CHECK_S = 10.0
_MAX_LOG_BYTES = 32 << 20

Result = TypeVar("Result")


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


class RayLauncher:
    """A `Launcher`, between `start` and `close`. Used on one event loop.

    All files are in `folder`, which must not exist and is removed at the end, and in `log_folder`.
    """

    def __init__(
        self,
        folder: Path,
        log_folder: Path,
        clock: Clock,
        *,
        gpus: int = 0,
        load_timeout_s: float = 900.0,
        grace_s: float = 10.0,
        max_log_bytes: int = _MAX_LOG_BYTES,
    ) -> None:
        """`grace_s`: how long requests may take in a process that gets a SIGTERM."""
        self._folder = folder
        self.log_folder = log_folder
        self._clock = clock
        self._gpus = gpus
        self._load_timeout_s = load_timeout_s
        self._grace_s = grace_s
        self._max_log_bytes = max_log_bytes
        self._waiting: dict[str, asyncio.Future[_Connection]] = {}
        self._hosted: dict[str, _HostedProcess] = {}  # by key
        self._server: asyncio.Server | None = None
        self._starts = 0
        self._ray = self._new_ray()
        self._is_up = asyncio.Event()

    async def start(self) -> None:
        """Start Ray, which takes some seconds. Raises UnavailableError. Call `close` afterwards in any case."""
        adopt_orphans()
        self._folder.mkdir(mode=0o700)
        self._server = await asyncio.start_unix_server(self._connected, self._socket_path)
        await self._ray.start(self._gpus)
        self._is_up.set()

    async def close(self) -> None:
        """End Ray and remove its files. The processes must have ended."""
        if self._server is not None:
            self._server.close()
        await self._ray.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _new_ray(self) -> Ray:
        self._starts += 1
        return Ray(self._folder / str(self._starts), self.log_folder / "ray.log")

    @property
    def _socket_path(self) -> str:
        return str(self._folder / "s")

    # --- processes ---------------------------------------------------------------------------------------------------

    async def launch(self, spec: ProcessSpec) -> RunningProcess:
        """Raises the application's error, or UnavailableError if Ray lacks resources, or the process died or did not
        become ready within `load_timeout_s`."""
        log_path = str(self.log_folder / f"{spec.name}.log")
        try:
            async with asyncio.timeout(self._load_timeout_s):
                return await self._launch(spec, log_path)
        except TimeoutError as error:
            limit = f"{self._load_timeout_s:g} s (load_timeout_s)"
            raise UnavailableError(f"{spec.name} was not ready within {limit}; its log is {log_path}") from error

    async def _launch(self, spec: ProcessSpec, log_path: str) -> RunningProcess:
        await self._is_up.wait()
        key = secrets.token_hex(8)
        self._waiting[key] = asyncio.get_running_loop().create_future()
        child = connection = None
        try:
            pid, devices = await self._spawn(key, spec, log_path)
            child = ChildProcess(pid)
            connection = await _unless_ended(child, self._waiting[key])
            await connection.send(Assignment(spec.name, spec.entry, spec.config, self._grace_s).to_json())
            report = await _unless_ended(child, asyncio.ensure_future(connection.receive()))
            if report is None:
                raise ProcessLookupError
            start = StartReport(**report)
            if start.error_code:
                raise _start_error(start, log_path)
        except ProcessLookupError as error:
            how = "" if child is None else f" ({await child.wait()})"
            await self._give_back(key, child, connection)
            raise UnavailableError(f"{spec.name} died while it started{how}; its log is {log_path}") from error
        except BaseException:
            await asyncio.shield(self._give_back(key, child, connection))
            raise
        finally:
            self._waiting.pop(key).cancel()
        info = ProcessInfo(spec.name, spec.role, pid, start.address, start.instance_id, log_path)
        hosted = _HostedProcess(
            info, child, connection, _bundle(spec), devices, self._grace_s, lambda: self._forget(key)
        )
        self._hosted[key] = hosted
        return hosted

    async def _spawn(self, key: str, spec: ProcessSpec, log_path: str) -> tuple[int, list[int | str]]:
        bundle, command = _bundle(spec), command_of(self._socket_path, key)
        ray = self._ray
        try:
            return await ray.spawn(key, bundle, command, environment_of(spec), log_path)
        except TimeoutError as error:
            if not spec.gpus:  # there is always room for a process without a device
                ray.fail(f"it did not start {spec.name} within {_PLACEMENT_S:g} s")
            raise UnavailableError(f"Ray has no resources for {spec.name}, which needs {bundle}") from error

    async def _give_back(self, key: str, child: ChildProcess | None, connection: "_Connection | None") -> None:
        if connection is not None:
            connection.close()
        if child is not None:
            await child.end()
        self._ray.release(key)

    def _forget(self, key: str) -> None:
        self._hosted.pop(key, None)
        self._ray.release(key)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(reader, writer)
        message = await connection.receive()
        waiting = self._waiting.get(message.get("key", "")) if message is not None else None
        if waiting is None or waiting.done():
            connection.close()  # of a launch that was given up: the process ends
        else:
            waiting.set_result(connection)

    # --- Ray, and logs -----------------------------------------------------------------------------------------------

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
        for key, process in list(self._hosted.items()):
            if not process.devices:
                continue
            try:
                _, devices = await self._ray.spawn(key, process.bundle, [], {}, "")
            except (TimeoutError, UnavailableError):
                devices = []
            if devices != process.devices:
                process.condemn("the new Ray has chosen its device for another process")

    async def bound_logs(self) -> None:
        """Until cancelled: a log that has become too long is moved to NAME.log.1, in the place of the last one."""
        while True:
            await asyncio.sleep(_LOG_CHECK_S)
            await asyncio.to_thread(self.shorten_logs)

    def shorten_logs(self) -> None:
        for log in self.log_folder.glob("*.log"):
            with contextlib.suppress(OSError):
                if log.stat().st_size > self._max_log_bytes:
                    shutil.copyfile(log, log.with_suffix(".log.1"))
                    os.truncate(log, 0)  # the process goes on writing at its end, which is now the beginning


def _bundle(spec: ProcessSpec) -> dict[str, float]:
    return {PROCESS_RESOURCE: 1.0} | ({"GPU": spec.gpus} if spec.gpus else {})


class _Connection:
    """To a process, see `deploy.hosted_process`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, fields: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the process has ended, which its parent learns by other means
            self._writer.write(json.dumps(fields).encode() + b"\n")
            await self._writer.drain()

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None after the process has ended."""
        with contextlib.suppress(OSError, ValueError):
            if line := await self._reader.readline():
                fields: dict[str, Any] = json.loads(line)
                return fields
        return None

    def close(self) -> None:
        self._writer.close()


class _HostedProcess:
    """`devices`: those that Ray has chosen for it, by number or name. `grace_s`: of a drain after a SIGTERM."""

    def __init__(
        self,
        info: ProcessInfo,
        child: ChildProcess,
        connection: _Connection,
        bundle: dict[str, float],
        devices: list[int | str],
        grace_s: float,
        forget: Callable[[], None],
    ) -> None:
        self.info = info
        self.bundle = bundle
        self.devices = devices
        self._grace_s = grace_s
        self._draining = asyncio.Event()
        self._child, self._connection, self._forget = child, connection, forget
        self._condemned: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._told: asyncio.Task[str | None] = asyncio.create_task(self._last_words(), name=f"{info.name} says")

    @property
    def is_draining(self) -> bool:
        return self._draining.is_set()

    async def wait_closed(self) -> ProcessEnd:
        ended, draining = asyncio.create_task(self._child.wait()), asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait((ended, self._told, self._condemned, draining), return_when=asyncio.FIRST_COMPLETED)
            if self._condemned.done():
                return ProcessEnd(self._condemned.result())
            if draining.done():
                await asyncio.wait((ended,), timeout=self._grace_s + _STOP_MARGIN_S)
                if not ended.done():
                    return ProcessEnd(f"it got a SIGTERM and has not ended within {self._grace_s + _STOP_MARGIN_S:g} s")
                return ProcessEnd("it got a SIGTERM and has left", was_asked=True)
            await asyncio.wait((ended,), timeout=_EXIT_S)
        finally:
            ended.cancel()
            draining.cancel()
        said = await self._told if self._told.done() else None
        reason = said or f"its process died ({await self._child.wait()})"
        return ProcessEnd(f"{reason}; its log is {self.info.log_path}")

    def condemn(self, reason: str) -> None:
        """Its end, as far as `wait_closed` is concerned."""
        if not self._condemned.done():
            self._condemned.set_result(reason)

    async def stop(self, grace_s: float) -> None:
        self._draining.set()
        await self._connection.send({"grace_s": grace_s})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s + _STOP_MARGIN_S):
                await self._child.wait()

    async def kill(self) -> None:
        await self._child.end()
        self._told.cancel()
        await asyncio.gather(self._told, return_exceptions=True)
        self._connection.close()
        self._forget()

    async def _last_words(self) -> str | None:
        """The reason that the process gives for its end; None if it ends without one."""
        while (message := await self._connection.receive()) is not None:
            if "draining" in message:
                self._draining.set()
            if "ended" in message:
                return str(message["ended"])
        await self._child.wait()
        return None


async def _unless_ended(child: ChildProcess, answer: "asyncio.Future[Result]") -> Result:
    """The answer. Raises ProcessLookupError if the process ends first."""
    ended = asyncio.create_task(child.wait())
    try:
        await asyncio.wait((ended, answer), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ProcessLookupError
        return answer.result()
    finally:
        ended.cancel()
        answer.cancel()


def _start_error(report: StartReport, log_path: str) -> TandemError:
    """The message of an internal error names the log; other messages need no log."""
    is_internal = report.error_code == InternalError.code
    message = f"{report.error_message}; its log is {log_path}" if is_internal else report.error_message
    return error_from_code(report.error_code, message)

"""Starts processes where Ray places them, and keeps Ray itself running.

Each instance has one placement group. A task in it starts the process (`deploy.hosted_process`), which then belongs to
this process: Ray's death ends none. Ray restarts nothing: the controller replaces an instance as a whole.
"""

import asyncio
import contextlib
import json
import secrets
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Self, TypeVar

from tandem.core.clock import Clock
from tandem.core.errors import InternalError, TandemError, UnavailableError, error_from_code
from tandem.deploy.child_process import ChildProcess
from tandem.deploy.controller import ProcessEnd, ProcessInfo, RunningProcess
from tandem.deploy.hosted_process import CLOSE_S, Assignment, StartReport, command_of, environment_of, spawn
from tandem.deploy.ray_cluster import PROCESS_RESOURCE, LocalRay, import_ray, options_in, reserve
from tandem.deploy.topology import ProcessSpec

_PLACEMENT_TIMEOUT_S = 30.0
_STOP_MARGIN_S = CLOSE_S + 2.0  # longer than a process needs to close, so that it can end by itself
_EXIT_S = 2.0  # from its last message to its end
_POLL_S = 0.5
_LONGEST_PAUSE_S = 30.0
_LOG_CHECK_S = 10.0
_MAX_LOG_BYTES = 32 << 20

Result = TypeVar("Result")


class RayLauncher:
    """A `Launcher`. Ray must have been started; use it as an async context manager, on one event loop."""

    def __init__(
        self,
        ray: LocalRay,
        log_folder: Path,
        clock: Clock,
        *,
        load_timeout_s: float = 900.0,
        grace_s: float = 10.0,
        max_log_bytes: int = _MAX_LOG_BYTES,
    ) -> None:
        """`grace_s`: how long requests may take in a process that gets a SIGTERM."""
        self._local_ray = ray
        self._ray = import_ray()
        self._log_folder = log_folder
        self._clock = clock
        self._load_timeout_s = load_timeout_s
        self._grace_s = grace_s
        self._max_log_bytes = max_log_bytes
        self._waiting: dict[str, asyncio.Future[_Connection]] = {}
        self._hosted: dict[str, _HostedProcess] = {}
        self._server: asyncio.Server | None = None
        self._is_up = asyncio.Event()
        self._is_up.set()
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._suspicion: str | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._connected, self._socket_path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    @property
    def _socket_path(self) -> str:
        return str(self._local_ray.folder / "s")

    # --- processes ---------------------------------------------------------------------------------------------------

    async def launch(self, spec: ProcessSpec) -> RunningProcess:
        """Raises the application's error, or UnavailableError if Ray lacks resources, or the process died or did not
        become ready within `load_timeout_s`."""
        log_path = self._log_folder / f"{spec.name}.log"
        try:
            async with asyncio.timeout(self._load_timeout_s):
                return await self._launch(spec, log_path)
        except TimeoutError as error:
            limit = f"{self._load_timeout_s:g} s (load_timeout_s)"
            raise UnavailableError(f"{spec.name} was not ready within {limit}; its log is {log_path}") from error

    async def _launch(self, spec: ProcessSpec, log_path: Path) -> RunningProcess:
        await self._is_up.wait()
        place = _Place(self._ray, {PROCESS_RESOURCE: 1.0} | ({"GPU": spec.gpus} if spec.gpus else {}))
        key = secrets.token_hex(8)
        self._waiting[key] = asyncio.get_running_loop().create_future()
        child = None
        try:
            await self._placed(place, spec)
            command, environment = command_of(self._socket_path, key), environment_of(spec)
            child = ChildProcess(await self._on_ray(place.run(spawn, command, environment, str(log_path))))
            connection = await _unless_ended(child, self._waiting[key])
            assignment = Assignment(spec.name, spec.entry, spec.config, self._grace_s)
            await connection.send(assignment.to_json())
            fields = await _unless_ended(child, asyncio.ensure_future(connection.receive()))
            report = StartReport(**fields) if fields is not None else None
            if report is None:
                raise ProcessLookupError
            if report.error_code:
                raise _start_error(report, str(log_path))
        except ProcessLookupError as error:
            how = "" if child is None else f": {await child.wait()}"
            await self._give_back(place, child)
            raise UnavailableError(f"{spec.name} died while it started{how}; its log is {log_path}") from error
        except BaseException:
            await asyncio.shield(self._give_back(place, child))
            raise
        finally:
            self._waiting.pop(key).cancel()
        info = ProcessInfo(spec.name, spec.role, child.pid, report.address, report.instance_id, str(log_path))
        hosted = self._hosted[spec.name] = _HostedProcess(info, child, connection, place, self._forget)
        return hosted

    async def _placed(self, place: "_Place", spec: ProcessSpec) -> None:
        try:
            async with asyncio.timeout(_PLACEMENT_TIMEOUT_S):
                await self._on_ray(place.reserve())
        except TimeoutError as error:
            reason = f"Ray has no resources for {spec.name}, which needs {place.bundle}"
            if not spec.gpus:  # there is always room for a process without a device
                self._suspicion = f"it did not place {spec.name} within {_PLACEMENT_TIMEOUT_S:g} s"
            raise UnavailableError(reason) from error

    async def _on_ray(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`. Raises UnavailableError when Ray fails, also where Ray itself would never answer."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self._lost), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise UnavailableError("Ray ended meanwhile")
            return task.result()
        except self._ray.exceptions.RayError as error:
            raise UnavailableError(f"Ray could not start a process ({type(error).__name__})") from error
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _give_back(self, place: "_Place", child: ChildProcess | None) -> None:
        if child is not None:
            await child.end()
        place.release()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(reader, writer)
        message = await connection.receive()
        waiting = self._waiting.get(message.get("key", "")) if message is not None else None
        if waiting is None or waiting.done():
            writer.close()  # of a launch that was given up: the process ends
        else:
            waiting.set_result(connection)

    def _forget(self, process: "_HostedProcess") -> None:
        if self._hosted.get(process.info.name) is process:
            del self._hosted[process.info.name]

    # --- Ray, and logs -----------------------------------------------------------------------------------------------

    async def keep_ray(self, notify: Callable[[str], None]) -> None:
        """Until cancelled: start Ray again when it has failed. `notify` gets a line about each event."""
        pause_s = 1.0
        while True:
            await asyncio.sleep(_POLL_S)
            reason = self._local_ray.failure() or self._suspicion
            if reason is None:
                continue
            if self._is_up.is_set():
                notify(f"Ray: {reason}; starting it again, while all processes go on")
                self._is_up.clear()
                self._lost.set_result(None)
            began_s = self._clock.now_s()
            try:
                await self._local_ray.restart()
            except Exception as error:  # noqa: BLE001 - whatever Ray raises, it is tried again
                first_line = str(error).partition("\n")[0]
                notify(f"Ray: {first_line}; trying again in {pause_s:.0f} s, while all processes go on")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            pause_s, self._suspicion = 1.0, None
            self._lost = asyncio.get_running_loop().create_future()
            await self._reserve_again()
            self._is_up.set()
            notify(f"Ray: up again in {self._clock.now_s() - began_s:.1f} s")

    async def _reserve_again(self) -> None:
        """Ray has to know which devices are taken. A process whose device it gives to another one is replaced."""
        for process in list(self._hosted.values()):
            if "GPU" not in process.place.bundle:
                process.place.forget()
                continue
            devices = process.place.devices
            try:
                async with asyncio.timeout(_PLACEMENT_TIMEOUT_S):
                    await process.place.reserve()
                    await process.place.run(int)
            except (TimeoutError, self._ray.exceptions.RayError):
                process.place.forget()
            if process.place.devices != devices:
                process.condemn("Ray has given its device to another process")

    async def bound_logs(self) -> None:
        """Until cancelled: a log that has become too long is moved to NAME.log.1, in the place of the last one."""
        while True:
            await asyncio.sleep(_LOG_CHECK_S)
            await asyncio.to_thread(self.shorten_logs)

    def shorten_logs(self) -> None:
        for log in self._log_folder.glob("*.log"):
            with contextlib.suppress(OSError):
                if log.stat().st_size > self._max_log_bytes:
                    shutil.copyfile(log, log.with_suffix(".log.1"))
                    with log.open("r+b") as file:  # the process goes on writing at the end, which is now the beginning
                        file.truncate(0)


class _Place:
    """What Ray holds for one process."""

    def __init__(self, ray: Any, bundle: dict[str, float]) -> None:
        self.bundle = bundle
        self.devices: list[int | str] = []
        self._ray = ray
        self._group: Any = None

    async def reserve(self) -> None:
        self._group = reserve(self._ray, self.bundle)
        await self._group.ready()

    async def run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Run it in a Ray task at that place; also tells `devices`."""
        task = self._ray.remote(_with_devices).options(**options_in(self._ray, self._group, self.bundle))
        self.devices, result = await task.remote(function, arguments)
        return result  # type: ignore[no-any-return]

    def forget(self) -> None:
        """The Ray that knew of it has ended."""
        self._group = None

    def release(self) -> None:
        if self._group is not None:
            with contextlib.suppress(Exception):  # of a Ray that has failed: there is nothing to give back
                self._ray.util.remove_placement_group(self._group)
            self._group = None


def _with_devices(function: Callable[..., Any], arguments: tuple[object, ...]) -> tuple[list[int | str], Any]:
    return import_ray().get_gpu_ids(), function(*arguments)


class _Connection:
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
    def __init__(
        self,
        info: ProcessInfo,
        child: ChildProcess,
        connection: _Connection,
        place: _Place,
        forget: Callable[["_HostedProcess"], None],
    ) -> None:
        self.info = info
        self.place = place
        self.is_draining = False
        self._child, self._connection, self._forget = child, connection, forget
        self._condemned: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._told: asyncio.Task[str | None] = asyncio.create_task(self._last_words(), name=f"{info.name} says")

    async def wait_closed(self) -> ProcessEnd:
        ended = asyncio.create_task(self._child.wait())
        try:
            await asyncio.wait((ended, self._told, self._condemned), return_when=asyncio.FIRST_COMPLETED)
            if self._condemned.done():
                return ProcessEnd(self._condemned.result())
            await asyncio.wait((ended,), timeout=_EXIT_S)
            reason = (await self._told if self._told.done() else None) or await ended
        finally:
            ended.cancel()
        if self.is_draining:
            return ProcessEnd("it got a SIGTERM and has left", was_asked=True)
        return ProcessEnd(f"{reason}; its log is {self.info.log_path}")

    def condemn(self, reason: str) -> None:
        """Its end, as far as `wait_closed` is concerned."""
        if not self._condemned.done():
            self._condemned.set_result(reason)

    async def stop(self, grace_s: float) -> None:
        self.is_draining = True
        await self._connection.send({"grace_s": grace_s})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s + _STOP_MARGIN_S):
                await self._child.wait()

    async def kill(self) -> None:
        await self._child.end()
        self._told.cancel()
        await asyncio.gather(self._told, return_exceptions=True)
        self._connection.close()
        self.place.release()
        self._forget(self)

    async def _last_words(self) -> str | None:
        """The reason that the process gives for its end; None if it ends without one."""
        while (message := await self._connection.receive()) is not None:
            self.is_draining |= message.get("draining", False)
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

"""Starts processes on this machine, and takes back those that an earlier controller has left running."""

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
from pathlib import Path

from tandem.core.errors import ConfigError, UnavailableError
from tandem.deploy.child_process import ChildProcess, adopt_orphans, spawn
from tandem.deploy.device_shares import DeviceShares
from tandem.deploy.hosted_process import Assignment, StartReport, command_of, environment_of
from tandem.deploy.launched_process import Connection, LaunchedProcess, start_error, unless_ended
from tandem.deploy.process_identity import ProcessIdentity
from tandem.deploy.process_records import ProcessRecord, ProcessRecords
from tandem.deploy.running_process import ProcessInfo, RunningProcess
from tandem.deploy.topology import ProcessSpec

log = logging.getLogger(__name__)

_RETURN_S = 10.0  # for a process to come back to a new controller; a healthy one takes a quarter of a second
_LOG_CHECK_S = 10.0
_MAX_LOG_BYTES = 32 << 20


class ProcessLauncher:
    """A `Launcher` between `start` and `close`, used on one event loop. It starts plain processes.

    With `records`, processes outlive it: the next launcher with the same `folder` and `records` takes them back. Then
    `folder` exists and stays. Without, it must not exist, is removed at the end, and the kernel ends the processes with
    this one.
    """

    def __init__(
        self,
        folder: Path,
        log_folder: Path,
        *,
        gpus: int = 0,
        load_timeout_s: float = 900.0,
        grace_s: float = 10.0,
        max_log_bytes: int = _MAX_LOG_BYTES,
        records: ProcessRecords | None = None,
    ) -> None:
        """`grace_s`: how long requests may take in a process that gets a SIGTERM."""
        self.log_folder = log_folder
        self._folder = folder
        self._load_timeout_s = load_timeout_s
        self._grace_s = grace_s
        self._max_log_bytes = max_log_bytes
        self._records = records
        self._devices = DeviceShares.of_this_machine(gpus)
        self._waiting: dict[str, asyncio.Future[Connection]] = {}  # by key
        self._to_take_back: dict[str, ProcessRecord] = {}  # by the process's name
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Raises a TandemError. Call `close` afterwards in any case."""
        adopt_orphans()
        if self._records is None:
            self._folder.mkdir(mode=0o700)
        else:
            for record in self._records.load():
                self._to_take_back[record.spec.name] = record
                self._expect(record.key)
                self._devices.take_again(record.key, record.spec.gpus, [str(name) for name in record.devices])
        self._socket_path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._connected, self._socket_path)

    async def close(self) -> None:
        """The processes must have ended."""
        if self._server is not None:
            self._server.close()
        if self._records is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _socket_path(self) -> Path:
        return self._folder / "s"

    def left_running(self) -> list[ProcessSpec]:
        """What an earlier controller has left; `launch` takes each back instead of starting it."""
        return [record.spec for record in self._to_take_back.values()]

    # --- processes ---------------------------------------------------------------------------------------------------

    async def launch(self, spec: ProcessSpec) -> RunningProcess:
        """Raises the application's error, or UnavailableError if resources are lacking, or the process died or did not
        become ready within `load_timeout_s`."""
        record = self._to_take_back.pop(spec.name, None)
        if record is not None and (process := await self._take_back(record)) is not None:
            return process
        log_path = self._log_path(spec)
        try:
            async with asyncio.timeout(self._load_timeout_s):
                return await self._launch(spec, log_path)
        except TimeoutError as error:
            limit = f"{self._load_timeout_s:g} s (load_timeout_s)"
            raise UnavailableError(f"{spec.name} was not ready within {limit}; its log is {log_path}") from error

    async def _launch(self, spec: ProcessSpec, log_path: str) -> RunningProcess:
        key = secrets.token_hex(8)
        waiting = self._expect(key)
        child = connection = None
        try:
            pid, devices = await self._spawn(key, spec, log_path)
            child = ChildProcess(pid)
            connection = await unless_ended(child, waiting)
            outlives = self._records is not None
            assignment = Assignment(spec.name, spec.entry, spec.config, self._grace_s, outlives)
            await connection.send(assignment.to_json())
            report = await unless_ended(child, asyncio.ensure_future(connection.receive()))
            identity = ProcessIdentity.of(pid)
            if report is None or identity is None:
                raise ProcessLookupError
            start = StartReport(**report)
            if start.error_code:
                raise start_error(start, log_path)
            record = ProcessRecord(spec, key, identity, start.address, start.instance_id, tuple(devices))
            self._remember(record)
        except ProcessLookupError as error:
            how = "" if child is None else f" ({await child.wait()})"
            await self._give_back(key, child, connection)
            raise UnavailableError(f"{spec.name} died while it started{how}; its log is {log_path}") from error
        except BaseException:
            await asyncio.shield(self._give_back(key, child, connection))
            raise
        finally:
            self._waiting.pop(key).cancel()
        return self._hosted(record, child, connection)

    async def _take_back(self, record: ProcessRecord) -> RunningProcess | None:
        """The process of an earlier controller, if it returns. One that does not, such as a stopped one, is ended: it
        would keep its devices and its memory."""
        process = None
        try:
            child = ChildProcess(record.identity.pid)
            if record.identity.is_alive:
                process = await self._wait_returned(record, child)
            else:
                child.release()  # the pid was given to another process before `child` held it fast
        except ProcessLookupError:
            pass  # it has just ended
        finally:
            self._waiting.pop(record.key).cancel()
            if process is None:
                self._is_gone(record)
        return process

    async def _wait_returned(self, record: ProcessRecord, child: ChildProcess) -> LaunchedProcess | None:
        try:
            async with asyncio.timeout(_RETURN_S):
                connection = await unless_ended(child, self._waiting[record.key])
            if connection.peer_pid == record.identity.pid:
                await connection.send({"taken": True})
                return self._hosted(record, child, connection)
            connection.close()
        except (TimeoutError, ProcessLookupError):
            pass
        except BaseException:
            await asyncio.shield(child.end())
            raise
        await child.end()
        return None

    def _remember(self, record: ProcessRecord) -> None:
        """For the next controller. A full disk must not keep a process that has died from being replaced."""
        if self._records is None:
            return
        try:
            self._records.save(record)
        except ConfigError as error:
            log.error("%s runs, but another controller would not take it back: %s", record.spec.name, error.message)

    def _is_gone(self, record: ProcessRecord) -> None:
        if self._records is not None:
            self._records.remove(record.spec.name)
        self._release(record.key)

    def _hosted(self, record: ProcessRecord, child: ChildProcess, connection: Connection) -> LaunchedProcess:
        spec = record.spec
        info = ProcessInfo(spec.name, spec.role, child.pid, record.address, record.instance_id, self._log_path(spec))
        return LaunchedProcess(
            info, child, connection, list(record.devices), self._grace_s, lambda: self._is_gone(record)
        )

    async def _spawn(self, key: str, spec: ProcessSpec, log_path: str) -> tuple[int, list[int | str]]:
        """Start the process; returns its pid and its devices. `_release` the key afterwards in any case."""
        devices = self._devices.take(key, spec.gpus)
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
        command = command_of(self._socket_path, key)
        spawning = asyncio.create_task(asyncio.to_thread(spawn, command, environment_of(spec) | visible, log_path))
        try:
            return await asyncio.shield(spawning), list(devices)
        except asyncio.CancelledError:
            await ChildProcess(await spawning).end()  # nobody else would learn of it
            raise

    def _release(self, key: str) -> None:
        """The process has ended, or was never started: give its devices back."""
        self._devices.give_back(key)

    async def _give_back(self, key: str, child: ChildProcess | None, connection: Connection | None) -> None:
        if connection is not None:
            connection.close()
        if child is not None:
            await child.end()
        self._release(key)

    def _expect(self, key: str) -> "asyncio.Future[Connection]":
        self._waiting[key] = asyncio.get_running_loop().create_future()
        return self._waiting[key]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        message = await connection.receive()
        waiting = self._waiting.get(message.get("key", "")) if message is not None else None
        if waiting is not None and not waiting.done():
            waiting.set_result(connection)
            return
        if message is not None and "returns" in message:
            await connection.send({"forgotten": True})
        connection.close()  # of a launch that was given up: the process ends

    # --- logs --------------------------------------------------------------------------------------------------------

    def _log_path(self, spec: ProcessSpec) -> str:
        return str(self.log_folder / f"{spec.name}.log")

    async def bound_logs(self) -> None:
        """Until cancelled: a log that has become too long is moved to NAME.log.1, in the place of the last one."""
        while True:
            await asyncio.sleep(_LOG_CHECK_S)
            await asyncio.to_thread(self.shorten_logs)

    def shorten_logs(self) -> None:
        for log in self.log_folder.glob("*.log"):
            with contextlib.suppress(OSError), log.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # several launchers of a host may have one folder
                if log.stat().st_size > self._max_log_bytes:
                    shutil.copyfile(log, log.with_suffix(".log.1"))
                    os.truncate(log, 0)  # the process goes on writing at its end, which is now the beginning

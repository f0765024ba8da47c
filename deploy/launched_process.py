"""A process that a launcher has started or taken back: the controller's end of `deploy.hosted_process`."""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Callable
from typing import Any, TypeVar

from tandem.core.errors import InternalError, TandemError, error_from_code
from tandem.deploy.child_process import ChildProcess
from tandem.deploy.hosted_process import CLOSE_S, StartReport
from tandem.deploy.running_process import ProcessEnd, ProcessInfo

_STOP_MARGIN_S = CLOSE_S + 2.0  # longer than a process needs to close, so that it can end by itself
_EXIT_S = 2.0  # from its last message to its end

Result = TypeVar("Result")


class Connection:
    """To a process, see `deploy.hosted_process`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @property
    def peer_pid(self) -> int:
        """The process at the other end, as the kernel knows it."""
        of_kernel = self._writer.get_extra_info("socket")
        credentials = of_kernel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", credentials)[0]
        return pid

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


class LaunchedProcess:
    """Implements `deploy.controller.RunningProcess`. `devices`: the GPUs that it has, by number or name. `grace_s`: of
    a drain after a SIGTERM. `forget` is called when it has been killed."""

    def __init__(
        self,
        info: ProcessInfo,
        child: ChildProcess,
        connection: Connection,
        devices: list[int | str],
        grace_s: float,
        forget: Callable[[], None],
    ) -> None:
        self.info = info
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


async def unless_ended(child: ChildProcess, answer: "asyncio.Future[Result]") -> Result:
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


def start_error(report: StartReport, log_path: str) -> TandemError:
    """The message of an internal error names the log; other messages need no log."""
    is_internal = report.error_code == InternalError.code
    message = f"{report.error_message}; its log is {log_path}" if is_internal else report.error_message
    return error_from_code(report.error_code, message)

"""A process on a node of a Ray cluster, as the controller sees it: by the actor that is its parent."""

import asyncio
import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tandem.core.clock import Clock
from tandem.deploy.running_process import ProcessEnd, ProcessInfo

UNREACHABLE_S = 15.0  # Ray itself gives a node that was cut off up a minute later
_SIGN_PERIOD_S = 1.0
_CALL_S = 5.0


class RayProcess:
    """Implements `deploy.controller.RunningProcess`, by its parent on another node. `release` gives back what Ray holds
    for it."""

    def __init__(
        self, info: ProcessInfo, where: str, host: Any, ray: ModuleType, clock: Clock, release: Callable[[], None]
    ) -> None:
        self.info = info
        self.is_draining = False
        self._where = where
        self._host = host
        self._ray = ray
        self._clock = clock
        self._release = release

    async def wait_closed(self) -> ProcessEnd:
        ended, silent = asyncio.create_task(self._wait_ended()), asyncio.create_task(self._wait_silent())
        try:
            await asyncio.wait((ended, silent), return_when=asyncio.FIRST_COMPLETED)
            return ended.result() if ended.done() else ProcessEnd(silent.result())
        finally:
            ended.cancel()
            silent.cancel()
            await asyncio.gather(ended, silent, return_exceptions=True)

    async def stop(self, grace_s: float) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):  # it has ended meanwhile
            await self._host.stop.remote(grace_s)

    async def kill(self) -> None:
        """A node that does not answer is left alone: Ray ends what runs there."""
        with contextlib.suppress(self._ray.exceptions.RayError, TimeoutError):
            async with asyncio.timeout(_CALL_S):
                await self._host.kill.remote()
        self._release()

    async def _wait_ended(self) -> ProcessEnd:
        exceptions = self._ray.exceptions
        while True:
            try:
                end: ProcessEnd = await self._host.wait_ended.remote()
                return ProcessEnd(f"on {self._where}: {end.reason}", end.was_asked)
            except exceptions.ActorUnavailableError:  # perhaps for a moment
                await asyncio.sleep(_SIGN_PERIOD_S)
            except exceptions.RayError as error:
                return ProcessEnd(f"its node {self._where} has died, or has left the Ray cluster ({first_line(error)})")

    async def _wait_silent(self) -> str:
        """Returns when the node has given no sign of life for `UNREACHABLE_S`, in which this process was not late."""
        answered_s = self._clock.now_s()
        while True:
            began_s = self._clock.now_s()
            with contextlib.suppress(self._ray.exceptions.RayError, TimeoutError):
                async with asyncio.timeout(_CALL_S):
                    self.is_draining = await self._host.is_draining.remote()
                answered_s = self._clock.now_s()
            now_s = self._clock.now_s()
            if now_s - began_s > _CALL_S + 1.0:
                answered_s = now_s
            if now_s - answered_s > UNREACHABLE_S:
                return f"its node {self._where} has not answered for {now_s - answered_s:.0f} s"
            await asyncio.sleep(_SIGN_PERIOD_S)


def first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"

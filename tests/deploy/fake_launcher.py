"""A launcher of processes that are only objects."""

import asyncio
from collections import deque

from tandem.deploy.running_process import ProcessEnd, ProcessInfo, RunningProcess
from tandem.deploy.topology import ProcessSpec


class FakeProcess:
    def __init__(self, spec: ProcessSpec, pid: int, order: list[str]) -> None:
        self.info = ProcessInfo(spec.name, spec.role, pid, "127.0.0.1:1", f"{spec.name}-{pid}", "/log")
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.stalled: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.is_draining = False
        self.was_asked = False
        self.graces: list[float] = []
        self.killed = False
        self.may_stop = asyncio.Event()
        self.may_stop.set()
        self._order = order

    async def wait_closed(self) -> ProcessEnd:
        return ProcessEnd(await asyncio.shield(self.died), self.was_asked)

    async def stop(self, grace_s: float) -> None:
        self.graces.append(grace_s)
        self._order.append(self.info.name)
        await self.may_stop.wait()

    async def kill(self) -> None:
        self.killed = True


class FakeLauncher:
    def __init__(self) -> None:
        self.launched: list[FakeProcess] = []
        self.errors: deque[Exception | None] = deque()
        self.stop_order: list[str] = []
        self.hold = False
        self.abandoned = 0

    async def launch(self, spec: ProcessSpec) -> RunningProcess:
        if self.hold:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.abandoned += 1
                raise
        if self.errors and (error := self.errors.popleft()):
            raise error
        process = FakeProcess(spec, 100 + len(self.launched), self.stop_order)
        self.launched.append(process)
        return process

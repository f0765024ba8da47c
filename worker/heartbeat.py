"""Keeps an instance registered with its routers."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from tandem.core.errors import TandemError
from tandem.core.session import InstanceStatus
from tandem.wire.channels import open_channel
from tandem.wire.fleet import send_heartbeat

log = logging.getLogger(__name__)


class Heartbeat:
    """One task per router, so that a hung one delays no other. A router that is away is tried again for ever."""

    def __init__(
        self, routers: Sequence[str], token: str | None, interval_s: float, status: Callable[[], InstanceStatus]
    ) -> None:
        self._routers = routers
        self._token = token
        self._interval_s = interval_s
        self._status = status
        self._changed = asyncio.Event()

    def send_now(self) -> None:
        """The status has changed: tell the routers at once."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for address in self._routers:
                group.create_task(self._report_to(address), name=f"heartbeat-{address}")

    async def _report_to(self, address: str) -> None:
        reachable = True
        async with open_channel(address, self._token) as channel:
            while True:
                changed = self._changed  # of the status that is read now: a change while it is sent is not lost
                try:
                    await send_heartbeat(channel, self._status(), timeout_s=max(1.0, 2 * self._interval_s))
                    if not reachable:
                        log.info("router %s is back", address)
                    reachable = True
                except TandemError as error:
                    if reachable:
                        log.warning("router %s does not take the heartbeat: %s", address, error.message)
                    reachable = False
                try:
                    async with asyncio.timeout(self._interval_s):
                        await changed.wait()
                except TimeoutError:
                    continue

"""Keeps an instance registered with its routers.

    address in the settings --resolved every RESOLVE_EVERY_S--> addresses of routers --> one reporting task each

A name in DNS may stand for several routers, and for other ones later (a Kubernetes service without a cluster IP does).
A task ends when the name no longer stands for its address and the router there no longer takes heartbeats: a router
that drains may have left DNS already, and needs its instances until its last request has ended.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence

from tandem.core.address import split_address
from tandem.core.errors import TandemError
from tandem.core.session import InstanceStatus
from tandem.core.tls import ClusterTls
from tandem.wire.channels import LastingChannel
from tandem.wire.fleet import send_heartbeat

log = logging.getLogger(__name__)

RESOLVE_EVERY_S = 1.0


class Heartbeat:
    """One task for each router, so that a hung router delays no other. A router that does not answer is tried again
    until `set_routers` removes it."""

    def __init__(
        self,
        routers: Sequence[str],
        token: str | None,
        interval_s: float,
        status: Callable[[], InstanceStatus],
        tls: ClusterTls | None = None,
    ) -> None:
        self._routers = frozenset(routers)
        self._token = token
        self._tls = tls
        self._interval_s = interval_s
        self._status = status
        self._changed = asyncio.Event()
        self._routers_changed = asyncio.Event()

    def send_now(self) -> None:
        """The status has changed: report to all routers at once."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def set_routers(self, routers: Sequence[str]) -> None:
        """Report to these routers, and to no others."""
        self._routers = frozenset(routers)
        self._routers_changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        reports: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                for address in reports.keys() - self._routers:
                    reports.pop(address).cancel()
                for address in self._routers - reports.keys():
                    reports[address] = group.create_task(self._report_to_all(address), name=f"routers-{address}")
                await self._routers_changed.wait()
                self._routers_changed.clear()

    async def _report_to_all(self, name: str) -> None:
        """Report to all routers that the name (host:port) stands for."""
        current: set[str] = set()
        reported: set[str] = set()

        async def report(address: str) -> None:
            await self._report_to(address, is_current=lambda: address in current)
            reported.discard(address)

        async with asyncio.TaskGroup() as group:
            while True:
                found = await _resolve(name)
                if found:  # else DNS does not answer, and the known addresses may still be right
                    current.clear()
                    current.update(found)
                for address in current - reported:
                    reported.add(address)
                    group.create_task(report(address), name=f"heartbeat-{address}")
                await asyncio.sleep(RESOLVE_EVERY_S)

    async def _report_to(self, address: str, is_current: Callable[[], bool]) -> None:
        reachable = True
        async with LastingChannel(address, self._token, self._tls) as channel:
            while is_current() or reachable:
                changed = self._changed  # read before the status, so that a change while it is sent is not lost
                try:
                    await send_heartbeat(await channel.get(), self._status(), timeout_s=max(1.0, 2 * self._interval_s))
                    if not reachable:
                        log.info("router %s is back", address)
                    reachable = True
                except TandemError as error:
                    if reachable:
                        log.warning("router %s does not take the heartbeat: %s", address, error.message)
                    reachable = False
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await changed.wait()


async def _resolve(name: str) -> set[str]:
    """The addresses (IP address and port) that host:port stands for now; empty without an answer of DNS."""
    host, port = split_address(name)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # no answer, or no name
        return set()
    return {f"[{ip}]:{port}" if ":" in str(ip) else f"{ip}:{port}" for *_, (ip, *_) in found}

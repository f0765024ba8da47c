"""The ranks of an instance on one more host: joins rank 0, and starts them as child processes.

JOINING --rank 0 has tickets--> RUNNING --rank 0 stops them--> ended
   |  tries again while nobody      |  a rank ends or is stopped, rank 0 is gone
   |  listens                       +--> all are killed, and the instance is lost
   +--refused--> a ConfigError
"""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import threading
import time
from functools import partial

from tandem.core.address import advertised
from tandem.core.config import RanksSection, WorkerConfig, with_secrets
from tandem.core.errors import ConfigError, UnavailableError
from tandem.engine.collectives.interface import RankLostError
from tandem.engine.collectives.shared_memory import SharedRegion
from tandem.kv_transfer.pool import create_pool_file
from tandem.worker.ranks.channel import FrameKind, RankChannel
from tandem.worker.ranks.child import RankFiles, StoppedTimes, start_rank
from tandem.worker.ranks.joining import HostTicket, JoinRequest, Purpose, join
from tandem.worker.ranks.peer import STOPPED_S

log = logging.getLogger(__name__)

_RETRY_S = 0.5
_TELL_EVERY_S = 30.0
_LOOK_EVERY_S = 0.1
_END_S = 5.0  # for the ranks to end after rank 0 has told them to


class RankHost:
    """`start`, then `wait_closed`; `drain_and_stop` ends it. `address` is that of rank 0."""

    def __init__(self, config: WorkerConfig) -> None:
        """Raises ConfigError for a secret that cannot be read, and settings without `ranks`."""
        self._config = with_secrets(config)
        if config.ranks is None:
            raise ConfigError("the settings have no section 'ranks': all ranks of the instance are on one host")
        self._ranks: RanksSection = config.ranks
        self._token = self._config.cluster_token or ""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._closing = threading.Event()
        self._rank_0: RankChannel | None = None
        self.address = config.ranks.listen
        self.instance_id = "ranks"

    async def start(self) -> None:
        """Returns when the ranks have been started; they load then. Raises ConfigError when rank 0 refuses this
        host, UnavailableError when it is gone meanwhile."""
        connection, ticket = await asyncio.to_thread(self._join)
        self._rank_0 = RankChannel(connection)
        # A name may stand for another pod a moment later, or be unknown.
        address = advertised(self._ranks.listen, connection.getpeername()[0])
        shape, ranks = ticket.hosts.shape, ticket.hosts.ranks_of(ticket.host)
        self.instance_id = f"ranks-{ranks.start}-to-{ranks.stop - 1}"
        region = SharedRegion.create(shape)
        try:
            # On this thread, which is the main one: the kernel ends children with the thread that started them.
            for rank in ranks:
                self._start_rank(rank, address, ticket, region)
        except OSError as error:
            self._kill()
            raise UnavailableError(f"rank 0 at {self._ranks.listen} is gone") from error
        finally:
            os.close(region)
        log.info("started the ranks %s of %s at %s", list(ranks), shape, self._ranks.listen)

    async def wait_closed(self) -> None:
        """Returns when the instance has stopped. Raises RankLostError when it was lost."""
        assert self._rank_0 is not None, "start first"
        is_told = asyncio.create_task(asyncio.to_thread(_wait_stop, self._rank_0))
        try:
            await self._watch(is_told)
        finally:
            self._kill()
            self._rank_0.close()
            with contextlib.suppress(RankLostError):
                await is_told

    async def drain_and_stop(self, grace_s: float) -> None:
        """Rank 0 ends the ranks once its requests have ended; after `grace_s` they end in any case."""
        until_s = time.monotonic() + grace_s
        while any(process.poll() is None for process in self._processes) and time.monotonic() < until_s:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_EVERY_S)
        self.close()

    def close(self) -> None:
        self._closing.set()
        self._kill()

    def _join(self) -> tuple[socket.socket, HostTicket]:
        """Until rank 0 listens."""
        address = self._ranks.listen
        told_s = -_TELL_EVERY_S
        while not self._closing.is_set():
            try:
                connection = join(address, self._token, JoinRequest(Purpose.HOST))
                kind, payload = RankChannel(connection).receive()
            except (OSError, EOFError) as error:
                if time.monotonic() - told_s > _TELL_EVERY_S:
                    log.info("rank 0 does not listen at %s yet (%s); trying again", address, error)
                    told_s = time.monotonic()
                self._closing.wait(_RETRY_S)
                continue
            if kind is not FrameKind.ASSIGN:
                connection.close()
                raise ConfigError(f"rank 0 at {address} refuses this host: {payload.decode(errors='replace')}")
            return connection, HostTicket.from_bytes(payload)
        raise UnavailableError("this process was told to end before rank 0 listened")

    def _start_rank(self, rank: int, address: str, ticket: HostTicket, region_fd: int) -> None:
        connect = partial(join, address, self._token)
        pool_fd = create_pool_file()
        try:
            with (
                connect(JoinRequest(Purpose.RANK, rank, ticket.ticket)) as frames,
                connect(JoinRequest(Purpose.KV, rank, ticket.ticket)) as kv,
            ):
                files = RankFiles(str(self._config.model), frames.fileno(), region_fd, pool_fd, kv=kv.fileno())
                self._processes.append(start_rank(files))
        finally:
            os.close(pool_fd)

    async def _watch(self, is_told: "asyncio.Task[None]") -> None:
        """Until all ranks have ended as rank 0 told them to, which ends `is_told`."""
        stopped = StoppedTimes(_LOOK_EVERY_S)
        told_s: float | None = None
        while True:
            statuses = [process.poll() for process in self._processes]
            if is_told.done() or all(status == 0 for status in statuses):
                await is_told
            if any(statuses):
                raise RankLostError("a rank on this host has ended; the log above says why, or rank 0 is gone")
            if all(status == 0 for status in statuses):
                return
            now_s = time.monotonic()
            stopped.look([process.pid for process in self._processes], now_s)
            if any(stopped.of(process.pid) >= STOPPED_S for process in self._processes):
                raise RankLostError("a rank on this host is stopped")
            if is_told.done():
                told_s = told_s or now_s
                if now_s - told_s > _END_S:
                    raise RankLostError("a rank on this host does not end")
            await asyncio.sleep(_LOOK_EVERY_S)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def _wait_stop(rank_0: RankChannel) -> None:
    """Until rank 0 stops the instance. Raises RankLostError when it is gone, or has lost the instance."""
    try:
        kind, payload = rank_0.receive()
    except EOFError as error:
        raise RankLostError("rank 0 is gone") from error
    if kind is not FrameKind.STOP:
        raise RankLostError(f"rank 0 has given up the instance: {payload.decode(errors='replace')}")

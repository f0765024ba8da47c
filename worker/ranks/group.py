"""Rank 0's side of the other ranks of its instance: starts or awaits them, announces steps to them, and watches them.

    main thread   start() ...................................... close()
    loop thread   place(), [load], wait_ready(), pools(), announce(step)...
    watch thread  every frame of every rank; a rank that ends, fails or is silent -> waits end, on_lost(error), once

The ranks of this host are child processes. Those of other hosts come by themselves (`worker.ranks.listener`); all ranks
are told what to load when the last one is there.
"""

import contextlib
import logging
import mmap
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tandem.core.address import split_address
from tandem.core.config import RanksSection
from tandem.core.errors import InternalError, TandemError
from tandem.core.instance_section import EngineSection
from tandem.core.kv_layout import KvLayout
from tandem.core.parallel import RankHosts
from tandem.engine.collectives.interface import RankLostError
from tandem.engine.collectives.shared_memory import SharedRegion
from tandem.engine.config import EngineConfig
from tandem.engine.device import choose_device
from tandem.engine.engine import RankPlace
from tandem.engine.step import SequenceSlice
from tandem.engine.step_bytes import encode_step
from tandem.kv_transfer.pool import SharedPool, create_pool_file
from tandem.kv_transfer.remote_pool import RemotePool
from tandem.worker.ranks.channel import FrameKind, LoadedRank, RankAssignment, RankChannel, RankReport
from tandem.worker.ranks.child import RankFiles, StoppedTimes, start_rank
from tandem.worker.ranks.follower import ALIVE_EVERY_S
from tandem.worker.ranks.listener import JoinedRank, RankListener
from tandem.worker.ranks.peer import SILENT_S, RankPeer
from tandem.worker.ranks.place import HostsMeetingPlace, MeetingPlace, engine_config
from tandem.worker.ranks.remote_pool import RankPool
from tandem.worker.ranks.store import RankStore

log = logging.getLogger(__name__)

_STOP_S = 5.0
_TELL_EVERY_S = 30.0


class RankGroup:
    """The other ranks of an instance of several ranks."""

    def __init__(
        self,
        model: Path,
        section: EngineSection,
        on_lost: Callable[[TandemError], None],
        ranks: RanksSection | None = None,
        token: str = "",
    ) -> None:
        """`on_lost` is called in the watch thread, at most once, when a rank is lost before `close`. `ranks`: those of
        other hosts, which know `token`; None: there are none."""
        self._model = model
        self._section = section
        self._on_lost = on_lost
        self._hosts = RankHosts(section.shape, (section.shape.num_ranks,) if ranks is None else ranks.per_host)
        self._address = "" if ranks is None else split_address(ranks.listen)[0]
        self._listener: RankListener | None = None
        if ranks is not None:
            self._listener = RankListener(ranks.listen, token, self._hosts, self._host_joined, self._rank_joined)
        self._store = RankStore(self._share)
        self._peers: list[RankPeer] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pool_fds: dict[int, int] = {}  # of the ranks of this host, until `pools` takes them
        self._remote_pools: dict[int, RankPool] = {}
        self._store_fd: int | None = None
        self._region: SharedRegion | None = None
        self._watching: threading.Thread | None = None
        self._changed = threading.Condition()
        self._is_assigned = False  # the ranks are being told what to load
        self._is_complete = False  # they have been told
        self._lost: TandemError | None = None
        self._closing = False

    def start(self) -> None:
        """Start the processes, and wait for other hosts from now on. On the main thread: the kernel ends the processes
        with the thread that started them. Raises ConfigError."""
        if self._listener is not None:
            self._listener.start()
        shape = self._section.shape
        self._store_fd = MeetingPlace.create_store()
        region_fd = SharedRegion.create(shape)
        try:
            self._region = SharedRegion(region_fd, shape)
            for rank in self._hosts.ranks_of(0)[1:]:
                self._start_rank(rank, region_fd, self._store_fd)
        finally:
            os.close(region_fd)
        self._assign_when_complete()
        self._watching = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watching.start()

    def engine_config(self) -> EngineConfig:
        """The configuration of rank 0. Raises ConfigError."""
        return engine_config(self._model, self._section, 0, self._hosts)

    def place(self) -> RankPlace:
        """This process's rank, 0. Blocks until the other ranks meet it, where that is necessary. Raises RankLostError
        or ConfigError."""
        assert self._region is not None, "start first"
        assert self._store_fd is not None
        device = choose_device(self.engine_config().device)
        self._wait_until(lambda: self._is_complete)
        meeting: MeetingPlace | HostsMeetingPlace
        if self._listener is None:
            meeting = MeetingPlace(self._section.shape, self._region, self._store_fd)
        else:
            meeting = HostsMeetingPlace(self._hosts, self._region, self._store, self._address)
        collectives = meeting.collectives(0, device)
        return RankPlace(self._section.shape, 0, collectives, self.announce, hashes_files=True)

    def wait_ready(self, own: LoadedRank) -> None:
        """Until all ranks have loaded. Raises the error of a rank that could not, or that has loaded something else
        than rank 0, which has loaded `own`."""
        ranks = [peer for peer in self._peers if peer.rank is not None]
        self._wait_until(lambda: all(peer.loaded is not None for peer in ranks))
        try:
            for peer in ranks:
                peer.check_alike(own, self._model)
        except TandemError as error:
            self._tell_hosts(error)
            raise

    def pools(self, layout: KvLayout) -> list[SharedPool | RemotePool]:
        """After `wait_ready`: the KV pools of the other ranks, in their order, for this process to read and write. They
        are the caller's."""
        return [
            self._map_pool(rank, layout) if rank in self._pool_fds else self._remote_pools.pop(rank)
            for rank in range(1, layout.num_ranks)
        ]

    def later_stages(self) -> list[tuple[int, int]]:
        """How far each stage after the first is: the last step with a prompt that it computes or has computed, and its
        layers of it."""
        assert self._region is not None, "start first"
        shape = self._section.shape
        return [self._region.reported(stage * shape.tp) for stage in range(1, shape.pp)]

    def announce(self, number: int, slices: Sequence[SequenceSlice]) -> None:
        """Tell the other ranks to compute a step. Raises RankLostError."""
        data = encode_step(number, slices)
        try:
            self._send_to_ranks(FrameKind.STEP, data)
        except OSError as error:
            raise RankLostError("another rank of the instance is gone") from error

    def close(self) -> None:
        """End the other ranks, which are between two steps; those that do not end by themselves are killed."""
        self._closing = True
        if self._listener is not None:
            self._listener.close()
        self._store.close()
        for peer in list(self._peers):
            try:
                peer.channel.send(FrameKind.STOP)
            except OSError:
                log.debug("%s ended before it was told to", peer.name)
        until_s = time.monotonic() + _STOP_S
        for process in self._processes:
            try:
                process.wait(max(0.0, until_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._watching is not None:
            self._watching.join(max(0.0, until_s - time.monotonic()))
        for peer in self._peers:
            peer.channel.close()
        for pool in self._remote_pools.values():
            pool.close()
        for fd in self._pool_fds.values():
            os.close(fd)
        self._remote_pools.clear()
        self._pool_fds.clear()
        if self._store_fd is not None:
            os.close(self._store_fd)
            self._store_fd = None

    # --- ranks come --------------------------------------------------------------------------------------------------

    def _start_rank(self, rank: int, region_fd: int, store_fd: int) -> None:
        ours, theirs = socket.socketpair()
        kv: socket.socket | None = None
        with theirs, contextlib.ExitStack() as given:
            pool_fd = create_pool_file()
            if self._maps_pools():
                self._pool_fds[rank] = pool_fd
            else:
                given.callback(os.close, pool_fd)
                own, other = socket.socketpair()
                kv = given.enter_context(other)
                self._remote_pools[rank] = RankPool(own, rank)
            files = RankFiles(
                str(self._model), theirs.fileno(), region_fd, pool_fd, store_fd, None if kv is None else kv.fileno()
            )
            process = start_rank(files)
        self._processes.append(process)
        self._add(RankPeer(RankChannel(ours), f"rank {rank}", rank, process.pid, self._address))

    def _maps_pools(self) -> bool:
        """Whether this process can map the KV pools of its host's ranks."""
        return choose_device(self._section.device).type == "cpu"

    def _host_joined(self, channel: RankChannel, address: str) -> None:
        self._add(RankPeer(channel, f"host {address}"))

    def _rank_joined(self, joined: JoinedRank) -> None:
        self._remote_pools[joined.rank] = RankPool(joined.kv, joined.rank)
        self._add(RankPeer(joined.channel, f"rank {joined.rank} on {joined.host}", joined.rank, address=joined.host))
        self._assign_when_complete()

    def _add(self, peer: RankPeer) -> None:
        with self._changed:
            self._peers = sorted([*self._peers, peer], key=lambda other: other.rank or 0)

    def _assign_when_complete(self) -> None:
        """Tell all ranks what to load, once they are all there: what one of them shares then reaches all others."""
        with self._changed:
            ranks = [peer for peer in self._peers if peer.rank is not None]
            if self._is_assigned or len(ranks) < self._section.shape.num_ranks - 1:
                return
            self._is_assigned = True
        per_host = () if self._listener is None else self._hosts.per_host
        for peer in ranks:
            assert peer.rank is not None
            assignment = RankAssignment(peer.rank, self._section, per_host, peer.address)
            try:
                peer.channel.send(FrameKind.ASSIGN, assignment.to_bytes())
            except OSError:
                log.debug("%s is gone already", peer.name)  # as the watch thread finds
        with self._changed:
            self._is_complete = True
            self._changed.notify_all()

    def _wait_until(self, has_come: Callable[[], bool]) -> None:
        """Raises the error with which a rank was lost."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._lost is not None or has_come(), _TELL_EVERY_S):
                missing = [peer.name for peer in self._peers if peer.rank is not None and peer.loaded is None]
                log.info("waiting for ranks; those that are there and load: %s", ", ".join(missing) or "none")
            if self._lost is not None:
                raise self._lost

    def _map_pool(self, rank: int, layout: KvLayout) -> SharedPool:
        fd, nbytes = self._pool_fds.pop(rank), layout.pool_of(rank).pool_bytes
        assert os.fstat(fd).st_size == nbytes, "all ranks divide the model in the same way"
        pool = SharedPool.open(fd, nbytes)
        pool.seal()  # the rank has mapped it, too
        pool.tensor[:: mmap.PAGESIZE].zero_()  # it is empty yet; the first transfers need not wait for its pages
        return pool

    def _tell_hosts(self, error: TandemError) -> None:
        """Why this instance ends."""
        for peer in self._peers:
            if peer.rank is None:
                with contextlib.suppress(OSError):
                    peer.channel.send(FrameKind.FAILED, error.message.encode())

    def _share(self, value: bytes) -> None:
        """A value of rank 0's, for `RankStore`."""
        self._send_to_ranks(FrameKind.SHARE, value)

    def _send_to_ranks(self, kind: FrameKind, data: bytes, but: RankPeer | None = None) -> None:
        for peer in self._peers:
            if peer.rank is not None and peer is not but:
                peer.channel.send(kind, data)

    # --- in the watch thread -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            error = self._watch_frames()
        except Exception as failure:
            if self._closing:  # which closes what is watched
                return
            log.exception("the watch over the other ranks failed")
            error = InternalError(f"the watch over the other ranks failed ({type(failure).__name__})")
        if error is not None:
            self._lose(error)

    def _watch_frames(self) -> TandemError | None:
        """Until a rank is lost, which is the result, or all have ended. A rank that loads may be silent."""
        ended: set[RankPeer] = set()
        stopped = StoppedTimes(ALIVE_EVERY_S)
        while True:
            peers = {peer.channel: peer for peer in self._peers if peer not in ended}
            if self._closing and not peers:
                return None
            readable, _, _ = select.select(peers, (), (), ALIVE_EVERY_S)
            stopped.look([peer.pid for peer in peers.values() if peer.pid is not None], time.monotonic())
            for peer in (peers[channel] for channel in readable):
                try:
                    kind, payload = peer.channel.receive()
                except (EOFError, TandemError):
                    ended.add(peer)
                    if self._closing:
                        continue
                    return RankLostError(f"{peer.name} of the instance has ended, or cannot be reached")
                if kind is FrameKind.FAILED:
                    return InternalError(f"{peer.name}: {payload.decode(errors='replace')}")
                self._take_frame(peer, kind, payload, stopped.observed_s)
            for peer in peers.values():
                if peer not in ended and not self._closing and peer.is_lost(stopped):
                    return RankLostError(f"{peer.name} of the instance is silent for {SILENT_S:.0f} s, or stopped")

    def _take_frame(self, peer: RankPeer, kind: FrameKind, payload: bytes, observed_s: float) -> None:
        if kind is FrameKind.SHARE:
            self._store.put(payload)
            self._send_to_ranks(FrameKind.SHARE, payload, but=peer)
            return
        peer.heard_s = observed_s
        if kind is FrameKind.REPORT:
            report = RankReport.from_bytes(payload)
            assert self._region is not None
            assert peer.rank is not None
            self._region.report(peer.rank, report.step, report.layers)
        if kind is FrameKind.READY:
            with self._changed:
                peer.loaded = LoadedRank.from_bytes(payload)
                self._changed.notify_all()

    def _lose(self, error: TandemError) -> None:
        log.critical("%s", error.message)
        self._tell_hosts(error)
        assert self._region is not None
        self._region.abort()
        self._store.close()
        with self._changed:
            self._lost = error
            self._changed.notify_all()
        self._on_lost(error)

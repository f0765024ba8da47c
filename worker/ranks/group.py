"""Rank 0's side of the other ranks of its instance: starts them, announces steps to them, and watches them.

main thread   start() ...................................... close()
loop thread   place(), [load], wait_ready(), map_pools(), announce(step)...
watch thread  every frame of every rank; a rank that ends, fails or is silent -> waits end, on_lost(error), once
"""

import json
import logging
import mmap
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tandem.core.errors import InternalError, TandemError
from tandem.core.instance_section import EngineSection
from tandem.core.kv_layout import KvLayout
from tandem.core.log_lines import configured_format
from tandem.engine.collectives.interface import RankLostError
from tandem.engine.collectives.shared_memory import SharedRegion
from tandem.engine.device import choose_device
from tandem.engine.engine import RankPlace
from tandem.engine.step import SequenceSlice
from tandem.engine.step_bytes import encode_step
from tandem.kv_transfer.pool import SharedPool, create_pool_file
from tandem.worker.ranks.channel import FrameKind, RankChannel
from tandem.worker.ranks.follower import ALIVE_EVERY_S
from tandem.worker.ranks.place import MeetingPlace, engine_config

log = logging.getLogger(__name__)

# A rank counts as lost when its process is stopped and it is silent for so long, or when it is silent for longer: a
# busy machine may leave a healthy process without a core for seconds.
STOPPED_S = 1.0
SILENT_S = 10.0
_STOP_S = 5.0


class RankGroup:
    """The other ranks of an instance of several ranks, as child processes of this one."""

    def __init__(self, model: Path, section: EngineSection, on_lost: Callable[[TandemError], None]) -> None:
        """`on_lost` is called in the watch thread, at most once, when a rank is lost before `close`."""
        self._model = model
        self._section = section
        self._on_lost = on_lost
        self._channels: list[RankChannel] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pool_fds: list[int] = []  # until `map_pools` takes them
        self._store_fd: int | None = None
        self._meeting: MeetingPlace | None = None
        self._watching: threading.Thread | None = None
        self._changed = threading.Condition()
        self._num_ready = 0
        self._lost: TandemError | None = None
        self._closing = False

    def start(self) -> None:
        """Start the processes. On the main thread: the kernel ends them with the thread that started them."""
        shape = self._section.shape
        self._store_fd = MeetingPlace.create_store()
        region_fd = SharedRegion.create(shape)
        try:
            self._meeting = MeetingPlace(shape, SharedRegion(region_fd, shape), self._store_fd)
            for rank in range(1, shape.num_ranks):
                self._start_rank(rank, region_fd, self._store_fd)
        finally:
            os.close(region_fd)
        self._watching = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watching.start()

    def place(self) -> RankPlace:
        """This process's rank, 0. Blocks until the other ranks meet it, where that is necessary. Raises RankLostError
        or ConfigError."""
        assert self._meeting is not None, "start first"
        device = choose_device(engine_config(self._model, self._section).device)
        return RankPlace(self._meeting.shape, 0, self._meeting.collectives(0, device), self.announce)

    def wait_ready(self) -> None:
        """Until all ranks have loaded. Raises the error of a rank that could not."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or self._num_ready == len(self._channels))
            if self._lost is not None:
                raise self._lost

    def map_pools(self, layout: KvLayout) -> list[SharedPool]:
        """After `wait_ready`, on a CPU: the KV pools of the other ranks, in their order, for this process to read and
        write. They are the caller's."""
        pools: list[SharedPool] = []
        while self._pool_fds:
            nbytes = layout.pool_of(1 + len(pools)).pool_bytes
            assert os.fstat(self._pool_fds[0]).st_size == nbytes, "all ranks divide the model in the same way"
            pool = SharedPool.open(self._pool_fds.pop(0), nbytes)
            pool.seal()  # the rank has mapped it, too
            pool.tensor[:: mmap.PAGESIZE].zero_()  # it is empty yet; the first transfers need not wait for its pages
            pools.append(pool)
        return pools

    def later_stages(self) -> list[tuple[int, int]]:
        """How far each stage after the first is: the step that it computes or computed last, and its layers of it."""
        assert self._meeting is not None, "start first"
        shape, region = self._section.shape, self._meeting.region
        return [region.reported(stage * shape.tp) for stage in range(1, shape.pp)]

    def announce(self, number: int, slices: Sequence[SequenceSlice]) -> None:
        """Tell the other ranks to compute a step. Raises RankLostError."""
        data = encode_step(number, slices)
        try:
            for channel in self._channels:
                channel.send(FrameKind.STEP, data)
        except OSError as error:
            raise RankLostError("another rank of the instance is gone") from error

    def close(self) -> None:
        """End the other ranks, which are between two steps; those that do not end by themselves are killed."""
        self._closing = True
        for channel in self._channels:
            try:
                channel.send(FrameKind.STOP)
            except OSError:
                log.debug("a rank ended before it was told to")
        until_s = time.monotonic() + _STOP_S
        for process in self._processes:
            try:
                process.wait(max(0.0, until_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._watching is not None:
            self._watching.join()
        for channel in self._channels:
            channel.close()
        for fd in self._pool_fds:
            os.close(fd)
        self._pool_fds.clear()
        if self._store_fd is not None:
            os.close(self._store_fd)
            self._store_fd = None

    def _start_rank(self, rank: int, region_fd: int, store_fd: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", "tandem.worker.ranks.follower"]
            self._pool_fds.append(create_pool_file())
            fds = (theirs.fileno(), region_fd, store_fd, self._pool_fds[-1])
            path = os.pathsep.join(path for path in sys.path if path)
            process = subprocess.Popen(
                [*command, *map(str, fds), str(os.getpid()), configured_format()],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
            )
        self._processes.append(process)
        channel = RankChannel(ours)
        self._channels.append(channel)
        fields = {
            "rank": rank,
            "model": str(self._model),
            "engine": self._section.model_dump(mode="json"),
        }
        channel.send(FrameKind.ASSIGN, json.dumps(fields).encode())

    # --- in the watch thread ---

    def _watch(self) -> None:
        try:
            error = self._watch_frames()
        except Exception as failure:
            log.exception("the watch over the other ranks failed")
            error = InternalError(f"the watch over the other ranks failed ({type(failure).__name__})")
        if error is not None:
            self._lose(error)

    def _watch_frames(self) -> TandemError | None:
        """Until a rank is lost, which is the result, or all have ended. A rank that loads may be silent."""
        heard_s: dict[RankChannel, float] = {}  # of ranks that have loaded
        open_channels = list(self._channels)
        looked_s = time.monotonic()
        while open_channels:
            readable, _, _ = select.select(open_channels, (), (), ALIVE_EVERY_S)
            now_s = time.monotonic()
            if now_s - looked_s > STOPPED_S / 2:  # this process was stopped itself, or had no core
                heard_s = dict.fromkeys(heard_s, now_s)
            looked_s = now_s
            for channel in readable:
                rank = self._channels.index(channel) + 1
                try:
                    kind, payload = channel.receive()
                except (EOFError, TandemError):
                    open_channels.remove(channel)
                    if self._closing:
                        continue
                    return RankLostError(f"rank {rank} of the instance has ended")
                if kind is FrameKind.FAILED:
                    return InternalError(f"rank {rank}: {payload.decode(errors='replace')}")
                heard_s[channel] = now_s
                if kind is FrameKind.READY:
                    with self._changed:
                        self._num_ready += 1
                        self._changed.notify_all()
            for channel, heard in heard_s.items():
                if channel in open_channels and not self._closing and self._is_lost(channel, now_s - heard):
                    rank = self._channels.index(channel) + 1
                    return RankLostError(f"rank {rank} of the instance is silent for {now_s - heard:.1f} s")
        return None

    def _is_lost(self, channel: RankChannel, silent_s: float) -> bool:
        if silent_s < STOPPED_S:
            return False
        process = self._processes[self._channels.index(channel)]
        return silent_s > SILENT_S or _is_stopped(process.pid)

    def _lose(self, error: TandemError) -> None:
        log.critical("%s", error.message)
        assert self._meeting is not None
        self._meeting.region.abort()
        with self._changed:
            self._lost = error
            self._changed.notify_all()
        self._on_lost(error)


def _is_stopped(pid: int) -> bool:
    """By a signal, or by a debugger. False for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in "Tt"

"""A rank that is not rank 0, started by rank 0:
`python -m tandem.worker.ranks.follower CHANNEL_FD REGION_FD STORE_FD POOL_FD PARENT LOG_FORMAT`.

It loads its part of the model, then computes the steps that rank 0 announces, until it is told to stop. It has no port
and no scheduler. Its KV pool is in memory that rank 0 maps, too: rank 0 writes KV there that comes in, and reads KV
that leaves. Any error, a step out of order and the end of rank 0 end the process, and with it the instance.
"""

import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tandem.core.errors import TandemError
from tandem.core.instance_section import EngineSection
from tandem.core.log_lines import configure_logging
from tandem.core.parent_process import end_with_parent
from tandem.engine.collectives.shared_memory import SharedRegion
from tandem.engine.device import choose_device
from tandem.engine.engine import Engine, RankPlace, load_engine
from tandem.engine.step_bytes import decode_step
from tandem.kv_transfer.pool import SharedPool
from tandem.worker.ranks.channel import FrameKind, RankChannel
from tandem.worker.ranks.place import MeetingPlace, engine_config

log = logging.getLogger(__name__)

ALIVE_EVERY_S = 0.2
_ADOPTION_S = 10.0


def main() -> int:
    *numbers, log_format = sys.argv[1:]
    channel_fd, region_fd, store_fd, pool_fd, parent = map(int, numbers)
    if not end_with_parent(parent, _ADOPTION_S):
        return 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: rank 0 drains, and stops this process when idle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging("json" if log_format == "json" else "text", f"rank {os.getpid()}")
    channel = RankChannel(socket.socket(fileno=channel_fd))
    try:
        _follow(channel, region_fd, store_fd, pool_fd)
    except EOFError:
        return 1  # rank 0 is gone
    except Exception as error:
        log.exception("a rank failed")
        message = error.message if isinstance(error, TandemError) else f"{type(error).__name__}: {error}"
        channel.send(FrameKind.FAILED, message.encode())
        return 1
    return 0


def _follow(channel: RankChannel, region_fd: int, store_fd: int, pool_fd: int) -> None:
    engine, report = _load(channel, region_fd, store_fd, pool_fd)
    channel.send(FrameKind.READY)
    threading.Thread(target=_stay_alive, args=(channel,), name="alive", daemon=True).start()
    frames: queue.SimpleQueue[tuple[FrameKind, bytes] | Exception] = queue.SimpleQueue()
    threading.Thread(target=_read_frames, args=(channel, frames), name="frames", daemon=True).start()
    while True:
        frame = frames.get()
        if isinstance(frame, Exception):
            raise frame
        kind, payload = frame
        if kind is FrameKind.STOP:
            return
        number, slices = decode_step(payload)
        report(number, 0)
        engine.follow(number, slices, partial(report, number))


def _read_frames(channel: RankChannel, frames: "queue.SimpleQueue[tuple[FrameKind, bytes] | Exception]") -> None:
    """Rank 0 announces steps while this rank computes earlier ones, and must not wait for room in the socket: this rank
    may wait for it."""
    while True:
        try:
            frames.put(channel.receive())
        except (EOFError, TandemError) as error:
            frames.put(error)
            return


def _load(
    channel: RankChannel, region_fd: int, store_fd: int, pool_fd: int
) -> tuple[Engine, Callable[[int, int], None]]:
    """The engine, and what tells rank 0 how far a step is."""
    _, payload = channel.receive()
    fields = json.loads(payload)
    section = EngineSection.model_validate(fields["engine"])
    shape, rank = section.shape, int(fields["rank"])
    config = engine_config(Path(fields["model"]), section, rank)
    place = MeetingPlace(shape, SharedRegion(region_fd, shape), store_fd)
    os.close(region_fd)
    device = choose_device(config.device)

    def allocate(num_bytes: int) -> torch.Tensor:
        pool = SharedPool.open(pool_fd, num_bytes) if device.type == "cpu" else SharedPool.create(num_bytes, device)
        return pool.tensor.zero_()  # the first touch of a page is slow; not in the first requests

    engine = load_engine(config, allocate, RankPlace(shape, rank, place.collectives(rank, device)))
    return engine, partial(place.region.report, rank)


def _stay_alive(channel: RankChannel) -> None:
    """Says that this process runs; how long its step takes is for rank 0 to judge."""
    while True:
        try:
            channel.send(FrameKind.ALIVE)
        except OSError:
            os._exit(1)  # rank 0 is gone, and this rank may be in a step that never ends
        time.sleep(ALIVE_EVERY_S)


if __name__ == "__main__":
    sys.exit(main())

"""A rank that is not rank 0: `python -m tandem.worker.ranks.follower FIELDS`, started by `worker.ranks.child`.

It loads its part of the model, then computes the steps that rank 0 announces, until it is told to stop. It has no port
and no scheduler. On a CPU of rank 0's host its KV pool is in memory that rank 0 maps, too: rank 0 writes KV there that
comes in, and reads KV that leaves. Elsewhere it does so over a connection (`worker.ranks.remote_pool`). Any error, a
step out of order and the end of rank 0 end the process, and with it the instance.

    main thread     load -> steps
    frames thread   every frame of rank 0; its end ends the process
    alive thread    tells rank 0 that this process runs
    KV thread       on another host, or on a GPU: reads and writes of rank 0
"""

import contextlib
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
from tandem.core.log_lines import configure_logging
from tandem.engine.collectives.shared_memory import SharedRegion
from tandem.engine.device import choose_device
from tandem.engine.engine import Engine, RankPlace, load_engine
from tandem.engine.step_bytes import decode_step
from tandem.kv_transfer.pool import SharedPool
from tandem.worker.ranks.channel import FrameKind, LoadedRank, RankAssignment, RankChannel, RankReport
from tandem.worker.ranks.child import RankFiles, be_a_rank
from tandem.worker.ranks.place import HostsMeetingPlace, MeetingPlace, engine_config
from tandem.worker.ranks.remote_pool import serve_pool
from tandem.worker.ranks.store import RankStore

log = logging.getLogger(__name__)

ALIVE_EVERY_S = 0.2


def main() -> int:
    if (started := be_a_rank(sys.argv[1])) is None:
        return 1
    files, log_format = started
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: rank 0 drains, and stops this process when idle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging("json" if log_format == "json" else "text", f"rank {os.getpid()}")
    channel = RankChannel(socket.socket(fileno=files.channel))
    try:
        _follow(channel, files)
    except EOFError:
        return 1  # rank 0 is gone
    except Exception as error:
        log.exception("a rank failed")
        message = error.message if isinstance(error, TandemError) else f"{type(error).__name__}: {error}"
        channel.send(FrameKind.FAILED, message.encode())
        return 1
    return 0


def _follow(channel: RankChannel, files: RankFiles) -> None:
    assignment = RankAssignment.from_bytes(channel.receive()[1])
    store = RankStore(partial(channel.send, FrameKind.SHARE))
    frames: queue.SimpleQueue[tuple[FrameKind, bytes] | TandemError] = queue.SimpleQueue()
    threading.Thread(target=_read_frames, args=(channel, store, frames), name="frames", daemon=True).start()
    engine, region = _load(assignment, files, store)
    is_far = files.store is None
    report = partial(_send_report, channel) if is_far else partial(region.report, assignment.rank)
    if files.kv is not None:
        layout = engine.layout.pool_of(assignment.rank)
        serving = partial(serve_pool, socket.socket(fileno=files.kv), engine.pool, layout)
        threading.Thread(target=_serve_kv, args=(serving, channel), name="kv", daemon=True).start()
    channel.send(FrameKind.READY, loaded_rank(engine).to_bytes())
    threading.Thread(target=_stay_alive, args=(channel,), name="alive", daemon=True).start()
    while True:
        frame = frames.get()
        if isinstance(frame, TandemError):
            raise frame
        kind, payload = frame
        if kind is FrameKind.STOP:
            return
        number, slices = decode_step(payload)
        computes_prompt = any(len(part.token_ids) > 1 for part in slices)
        engine.follow(number, slices, partial(report, number) if computes_prompt else None)


def loaded_rank(engine: Engine) -> LoadedRank:
    layout = engine.layout
    return LoadedRank(layout.weights_hash, layout.dtype, str(engine.activation_dtype), layout.num_blocks)


def _read_frames(
    channel: RankChannel, store: RankStore, frames: "queue.SimpleQueue[tuple[FrameKind, bytes] | TandemError]"
) -> None:
    """Rank 0 announces steps while this rank computes earlier ones, and must not wait for room in the socket: this rank
    may wait for it."""
    while True:
        try:
            kind, payload = channel.receive()
        except EOFError:
            os._exit(1)  # rank 0 is gone, and this rank may be in a step, or a meeting, that never ends
        except TandemError as error:
            frames.put(error)
            return
        if kind is FrameKind.SHARE:
            store.put(payload)
            continue
        frames.put((kind, payload))
        if kind is FrameKind.STOP:  # the connection ends now
            return


def _load(assignment: RankAssignment, files: RankFiles, store: RankStore) -> tuple[Engine, SharedRegion]:
    """The engine, and the memory of its host's ranks."""
    section, rank, hosts = assignment.section, assignment.rank, assignment.hosts
    shape = section.shape
    config = engine_config(Path(files.model), section, rank, hosts)
    region = SharedRegion(files.region, shape)
    os.close(files.region)
    device = choose_device(config.device)
    place: MeetingPlace | HostsMeetingPlace
    if hosts is None:
        assert files.store is not None
        place = MeetingPlace(shape, region, files.store)
    else:
        place = HostsMeetingPlace(hosts, region, store, assignment.address)

    def allocate(num_bytes: int) -> torch.Tensor:
        on_cpu = device.type == "cpu"
        pool = SharedPool.open(files.pool, num_bytes) if on_cpu else SharedPool.create(num_bytes, device)
        return pool.tensor.zero_()  # the first touch of a page is slow; not in the first requests

    # The files of rank 0's host are those that rank 0 has read.
    hashes = hosts is not None and hosts.host_of(rank) > 0 and rank == hosts.ranks_of(hosts.host_of(rank)).start
    rank_place = RankPlace(shape, rank, place.collectives(rank, device), hashes_files=hashes)
    return load_engine(config, allocate, rank_place), region


def _serve_kv(serve: Callable[[], None], channel: RankChannel) -> None:
    """Until rank 0 closes the connection; an error is the end of this rank."""
    try:
        serve()
    except Exception as error:
        log.exception("rank 0 cannot read or write KV here")
        with contextlib.suppress(OSError):
            channel.send(FrameKind.FAILED, f"its KV cannot be read or written ({type(error).__name__})".encode())
        os._exit(1)


def _send_report(channel: RankChannel, step: int, layers: int) -> None:
    channel.send(FrameKind.REPORT, RankReport(step, layers).to_bytes())


def _stay_alive(channel: RankChannel) -> None:
    """Says that this process runs; how long its step takes is for rank 0 to judge."""
    while True:
        try:
            channel.send(FrameKind.ALIVE)
        except OSError:
            os._exit(1)  # rank 0 is gone, and this rank may be in a step that never ends
        time.sleep(ALIVE_EVERY_S)


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    os._exit(status)  # process groups may wait for their peers, which end as well, when they are destroyed

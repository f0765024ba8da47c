"""Publishes changes of an instance's prefix cache, in vLLM's format, which Dynamo and llm-d read.

A message has three parts: topic, number (8 bytes, big-endian, from 0 on), and a batch in msgpack. A batch is [seconds
since 1970, events, 0], where 0 is the rank that vLLM calls data parallel, and an event is one of

    ["BlockStored", hashes, parent hash or nil, token ids, block size, nil, "GPU"]
    ["BlockRemoved", hashes, "GPU"]
    ["AllBlocksCleared"]

The nil is the LoRA adapter. "GPU" is vLLM's word for the memory in which the engine computes, on CPUs too. A hash is
the lowest 64 bits of a block's name as a number; subscribers work out hashes of their own from the token ids. Sources:
vllm/distributed/kv_events.py, llm-d-kv-cache pkg/kvevents/engineadapter/vllm_adapter.go.

A subscriber that has missed batches sends [number] to the replay endpoint. It gets [number, batch] for each batch from
that number on that is still kept, and then [-1, empty].
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count

import msgpack
import zmq

from tandem.core.errors import ConfigError
from tandem.core.monitoring_config import KvEventsSection
from tandem.scheduling.prefix_index import BlocksCached, BlocksEvicted, CacheChange, CacheCleared

log = logging.getLogger(__name__)

_MEDIUM = "GPU"
_END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
_MAX_QUEUED_MESSAGES = 100_000  # for a subscriber that does not read; it misses later messages
_REPLAY_EVERY_S = 0.1
_CLOSE_S = 2.0
_LINGER_MS = 500


class KvEventPublisher:
    """Call `start`, then `publish` for each change, then `close`. A thread sends, and never waits for subscribers."""

    def __init__(
        self,
        settings: KvEventsSection,
        *,
        name: str,
        model: str,
        block_size: int,
        wall_time_s: Callable[[], float] = time.time,
    ) -> None:
        """`name` is the instance's name, which stays the same over restarts."""
        self._settings = settings
        self._name = name
        self._topic = settings.topic.replace("{name}", name).replace("{model}", model).encode()
        self._block_size = block_size
        self._wall_time_s = wall_time_s
        self._queue: queue.SimpleQueue[Sequence[CacheChange] | None] = queue.SimpleQueue()
        self._numbers = count()
        self._sent: deque[tuple[bytes, bytes]] = deque(maxlen=settings.buffer_batches)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Connect or listen, and publish that the cache is empty: an earlier process of that name may have published
        blocks. Raises ConfigError."""
        assert self._settings.endpoint is not None
        publisher = self._open(zmq.PUB, self._settings.endpoint, bind=self._settings.bind)
        replay = None
        if self._settings.replay_endpoint is not None:
            replay = self._open(zmq.ROUTER, self._settings.replay_endpoint, bind=True)
        self._thread = threading.Thread(target=self._run, args=(publisher, replay), name="kv-events", daemon=True)
        self._thread.start()
        self.publish([CacheCleared()])

    def publish(self, changes: Sequence[CacheChange]) -> None:
        """Never blocks."""
        self._queue.put(changes)

    def close(self) -> None:
        """Send queued batches, for at most about two seconds, and close the sockets."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_CLOSE_S)
        for socket in self._sockets:
            socket.close(linger=_LINGER_MS)
        self._context.term()

    def _open(self, kind: int, endpoint: str, bind: bool) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        self._sockets.append(socket)
        socket.set_hwm(_MAX_QUEUED_MESSAGES)
        endpoint = endpoint.replace("{name}", self._name)
        try:
            (socket.bind if bind else socket.connect)(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"kv_events cannot use {endpoint}: {error.strerror}") from error
        log.info("events of the prefix cache %s %s", "on" if bind else "to", endpoint)
        return socket

    def _run(self, publisher: "zmq.Socket[bytes]", replay: "zmq.Socket[bytes] | None") -> None:
        while True:
            while replay is not None and replay.poll(0):
                self._answer(replay)
            try:
                changes = self._queue.get(timeout=_REPLAY_EVERY_S)
            except queue.Empty:
                continue
            if changes is None:
                return
            number = next(self._numbers).to_bytes(8, "big")
            batch = msgpack.packb([self._wall_time_s(), [self._event(change) for change in changes], 0])
            publisher.send_multipart((self._topic, number, batch))
            self._sent.append((number, batch))

    def _answer(self, replay: "zmq.Socket[bytes]") -> None:
        """Answer one request for old batches."""
        parts = replay.recv_multipart()
        if len(parts) != 3 or len(parts[2]) != 8:
            log.warning("a request for old events is malformed")
            return
        subscriber, _, first = parts
        for number, batch in self._sent:
            if number >= first:
                replay.send_multipart((subscriber, b"", number, batch))
        replay.send_multipart((subscriber, b"", _END_OF_REPLAY, b""))

    def _event(self, change: CacheChange) -> list[object]:
        match change:
            case BlocksCached(names, parent, token_ids):
                parent_hash = None if parent is None else _hash(parent)
                hashes = [_hash(name) for name in names]
                return ["BlockStored", hashes, parent_hash, token_ids, self._block_size, None, _MEDIUM]
            case BlocksEvicted(names):
                return ["BlockRemoved", [_hash(name) for name in names], _MEDIUM]
            case CacheCleared():
                return ["AllBlocksCleared"]


def _hash(name: bytes) -> int:
    return int.from_bytes(name[-8:], "big")

"""Events of the prefix cache, as a subscriber reads them with the types that vLLM publishes (msgspec, array-like)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import zmq

from tandem.core.errors import ConfigError
from tandem.core.instance_section import InstanceSection
from tandem.core.monitoring_config import KvEventsSection
from tandem.scheduling.prefix_index import BlocksCached, BlocksEvicted, CacheCleared
from tandem.worker.kv_events import KvEventPublisher


class BlockStored(msgspec.Struct, array_like=True, tag=True):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None = None


class BlockRemoved(msgspec.Struct, array_like=True, tag=True):
    block_hashes: list[int | bytes]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, array_like=True, tag=True):
    pass


class EventBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


FIRST, SECOND = b"\0" * 24 + (2**64 - 1).to_bytes(8, "big"), b"\0" * 31 + b"\2"
STORED = BlocksCached((FIRST, SECOND), None, (1, 2, 3, 4))
DECODER = msgspec.msgpack.Decoder(EventBatch)


@contextmanager
def publishing(folder: Path, replay: bool = False) -> Iterator[tuple[KvEventPublisher, "zmq.Socket[bytes]", str]]:
    """A publisher with a subscriber that listens, as a gateway does, and the replay endpoint."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.SUBSCRIBE, b"kv@")
    subscriber.setsockopt(zmq.RCVTIMEO, 20_000)
    port = subscriber.bind_to_random_port("tcp://127.0.0.1")
    replay_endpoint = f"ipc://{folder}/{{name}}-replay"
    settings = KvEventsSection(endpoint=f"tcp://127.0.0.1:{port}", replay_endpoint=replay_endpoint if replay else None)
    publisher = KvEventPublisher(settings, name="decode-0", model="tiny", block_size=2, wall_time_s=lambda: 7.5)
    publisher.start()
    try:
        deadline_s = time.monotonic() + 20.0  # what is published before the connection is there is lost
        while not subscriber.poll(50):
            publisher.publish([CacheCleared()])
            assert time.monotonic() < deadline_s
        yield publisher, subscriber, replay_endpoint.format(name="decode-0")
    finally:
        publisher.close()
        context.destroy(linger=0)


def read_until(subscriber: "zmq.Socket[bytes]", count: int) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
    """Events that are not the cleared cache of a start, once there are that many."""
    events: list[BlockStored | BlockRemoved | AllBlocksCleared] = []
    while len(events) < count:
        topic, number, payload = subscriber.recv_multipart()
        assert topic == b"kv@decode-0@tiny"
        assert len(number) == 8
        batch = DECODER.decode(payload)
        assert (batch.ts, batch.data_parallel_rank) == (7.5, 0)
        events += [event for event in batch.events if not isinstance(event, AllBlocksCleared)]
    return events


def test_a_gateway_reads_what_was_stored_and_removed(tmp_path: Path) -> None:
    with publishing(tmp_path) as (publisher, subscriber, _):
        publisher.publish([STORED, BlocksCached((b"\5" * 32,), SECOND, (5, 6))])
        publisher.publish([BlocksEvicted((SECOND,))])
        one, two, removed = read_until(subscriber, 3)
    assert one == BlockStored([2**64 - 1, 2], None, [1, 2, 3, 4], 2, None, "GPU")
    assert two == BlockStored([int.from_bytes(b"\5" * 8, "big")], 2, [5, 6], 2, None, "GPU")
    assert removed == BlockRemoved([2], "GPU")


def test_missed_batches_can_be_asked_for(tmp_path: Path) -> None:
    with publishing(tmp_path, replay=True) as (publisher, subscriber, replay_endpoint):
        for i in range(3):
            publisher.publish([BlocksEvicted((i.to_bytes(32, "big"),))])
        read_until(subscriber, 3)
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.RCVTIMEO, 20_000)
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(replay_endpoint)
            dealer.send_multipart((b"", b"malformed!"))
            dealer.send_multipart((b"", (0).to_bytes(8, "big")))
            batches = []
            while (parts := dealer.recv_multipart())[1] != b"\xff" * 8:
                assert int.from_bytes(parts[1], "big") == len(batches)
                batches.append(DECODER.decode(parts[2]))
    assert batches[0].events == [AllBlocksCleared()], "a new instance says that its predecessor's blocks are gone"
    removed = [event for batch in batches for event in batch.events if isinstance(event, BlockRemoved)]
    assert [event.block_hashes for event in removed] == [[0], [1], [2]]


def test_an_endpoint_that_cannot_be_used_is_reported() -> None:
    settings = KvEventsSection(endpoint="tcp://nowhere.invalid:1", bind=True, open_to_network=True)
    publisher = KvEventPublisher(settings, name="d", model="m", block_size=2)
    with pytest.raises(ConfigError, match=r"kv_events cannot use tcp://nowhere\.invalid:1: "):
        publisher.start()


def test_several_instances_cannot_listen_on_one_port() -> None:
    events = KvEventsSection(endpoint="tcp://127.0.0.1:5557", bind=True)
    InstanceSection(kv_events=events)
    with pytest.raises(ValueError, match="can be the port of one instance only, and there are 2"):
        InstanceSection(instances=2, kv_events=events)
    InstanceSection(instances=2, kv_events=KvEventsSection(endpoint="ipc:///run/tandem/{name}", bind=True))
    InstanceSection(instances=2, kv_events=KvEventsSection(endpoint="tcp://gateway:5557"))


@pytest.mark.parametrize(
    "settings",
    [
        {"endpoint": "tcp://*:5557", "bind": True},
        {"endpoint": "tcp://0.0.0.0:5557", "bind": True},
        {"endpoint": "tcp://gateway:5557", "replay_endpoint": "tcp://10.0.0.1:5558"},
    ],
)
def test_prompts_are_not_published_to_the_network_by_accident(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="events have the token ids of all prompts"):
        InstanceSection(kv_events=settings)  # type: ignore[arg-type]
    InstanceSection(kv_events=settings | {"open_to_network": True})  # type: ignore[arg-type]

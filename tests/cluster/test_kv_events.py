"""A subscriber knows what the prefix cache of a real instance holds."""

from pathlib import Path

import httpx
import msgpack
import pytest
import zmq

from tests.cluster.harness import running_cluster

PROMPT = list(range(3, 3 + 40))  # two full blocks of 16 tokens, and half of one
BODY = {"model": "tiny-python", "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}


@pytest.mark.slow
def test_prompts_of_a_colocated_instance_are_published(built_in_model: Path, tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.setsockopt(zmq.SUBSCRIBE, b"kv@colocated-0@")
        subscriber.setsockopt(zmq.RCVTIMEO, 60_000)
        subscriber.setsockopt(zmq.LINGER, 0)
        port = subscriber.bind_to_random_port("tcp://127.0.0.1")
        colocated = {"kv_events": {"endpoint": f"tcp://127.0.0.1:{port}"}}
        with running_cluster(
            built_in_model, tmp_path, num_prefill=0, decode_transports=(), num_colocated=1, colocated=colocated
        ) as cluster:
            subscriber.poll(1000)  # a subscriber that does not read has not subscribed yet
            for salt in ("a tenant's own", ""):
                body = BODY | {"cache_salt": salt} if salt else BODY
                assert httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).status_code == 200
            stored: list[object] = []
            while not stored:
                topic, _, batch = subscriber.recv_multipart()
                assert topic == b"kv@colocated-0@tiny-python"
                stored = [event for event in msgpack.unpackb(batch)[1] if event[0] == "BlockStored"]
        (event,) = stored
        assert isinstance(event, list)
        assert event[2:5] == [None, PROMPT[:32], 16]

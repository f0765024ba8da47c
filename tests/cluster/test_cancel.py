"""A client that goes away, in whatever phase, frees everything on both workers within a second."""

import asyncio
import random
import socket
import time

import httpx
import pytest

from tandem import AsyncClient
from tandem.core.errors import DeadlineError
from tests.cluster.harness import Cluster

NUM_ABORTED = 500
AT_ONCE = 25
FREED_WITHIN_S = 1.0


async def _abort_grpc(client: AsyncClient, draw: random.Random) -> None:
    token_ids = [draw.randrange(3, 4000) for _ in range(draw.choice((1, 20, 200, 1500)))]
    stream = client.stream(token_ids=token_ids, max_tokens=200, ignore_eos=True, timeout_s=60.0)
    try:
        async with asyncio.timeout(draw.choice((0.0, 0.005, 0.05, 0.3)) * draw.random()):
            async for _ in stream:
                pass
    except TimeoutError:
        stream.close()


async def _abort_http(cluster: Cluster, client: httpx.AsyncClient, draw: random.Random) -> None:
    body = {
        "model": "tiny-python",
        "prompt": [draw.randrange(3, 4000) for _ in range(draw.choice((1, 20, 200, 1500)))],
        "max_tokens": 200,
        "stream": draw.random() < 0.5,
        "ignore_eos": True,
    }
    try:
        async with asyncio.timeout(draw.choice((0.005, 0.05, 0.3)) * draw.random()):
            async with client.stream("POST", f"{cluster.url}/v1/completions", json=body) as response:
                async for _ in response.aiter_bytes():
                    pass
    except TimeoutError:
        return


async def _abort_many(cluster: Cluster) -> None:
    draw = random.Random(11)
    async with AsyncClient(cluster.grpc_address) as grpc_client, httpx.AsyncClient(timeout=60.0) as http_client:

        async def abort_some(count: int) -> None:
            for _ in range(count):
                if draw.random() < 0.5:
                    await _abort_grpc(grpc_client, draw)
                else:
                    await _abort_http(cluster, http_client, draw)

        await asyncio.gather(*(abort_some(NUM_ABORTED // AT_ONCE) for _ in range(AT_ONCE)))


@pytest.mark.timeout(300)
def test_aborted_requests_leave_nothing(cluster: Cluster) -> None:
    asyncio.run(_abort_many(cluster))
    cluster.wait_idle(timeout_s=FREED_WITHIN_S)
    answer = httpx.post(
        f"{cluster.url}/v1/completions",
        json={"model": "tiny-python", "prompt": "def read_json(path):", "max_tokens": 4},
        timeout=30.0,
    )
    assert answer.status_code == 200, answer.text


def test_a_vanished_socket_frees_everything(cluster: Cluster) -> None:
    body = b'{"model":"tiny-python","prompt":"x","max_tokens":4000,"stream":true,"ignore_eos":true}'
    headers = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    head = f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", cluster.http_port)) as raw:
        raw.sendall(head + body)
        assert raw.recv(64).startswith(b"HTTP/1.1 200")
    cluster.wait_idle(timeout_s=FREED_WITHIN_S)


def test_a_passed_deadline_frees_everything(cluster: Cluster) -> None:
    async def too_long() -> None:
        async with AsyncClient(cluster.grpc_address) as client:
            await client.generate(token_ids=[5], max_tokens=4000, ignore_eos=True, timeout_s=0.4)

    started_s = time.monotonic()
    with pytest.raises(DeadlineError):
        asyncio.run(too_long())
    assert time.monotonic() - started_s < 3.0
    cluster.wait_idle(timeout_s=FREED_WITHIN_S)

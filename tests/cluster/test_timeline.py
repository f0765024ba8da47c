"""The timeline that a response carries sums to what its client measured; metrics tell the same story."""

import asyncio
import http.client
import json
import statistics
import time
from typing import Any

import httpx
import pytest

from tandem import AsyncClient
from tandem.core.timeline import PARTS
from tests.cluster.harness import Cluster

NUM_REQUESTS = 15
CLOSE_S = 0.005
BODY = {
    "model": "tiny-python",
    "prompt": "import os\n",
    "max_tokens": 24,
    "temperature": 0,
    "ignore_eos": True,
    "tandem": {"timeline": True},
}


def _typical(gaps: list[float]) -> float:
    """The lower quartile: on a busy machine most requests meet the scheduler, which is in no timeline."""
    return statistics.quantiles(gaps, n=4)[0]


def test_http_parts_sum_to_the_time_the_client_measured(cluster: Cluster) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.http_port)
    gaps = []
    for _ in range(NUM_REQUESTS):
        body = json.dumps(BODY)
        started_s = time.monotonic()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        measured_s = time.monotonic() - started_s
        timeline = answer["usage"]["tandem"]["timeline"]
        assert sum(timeline["parts"].values()) == pytest.approx(timeline["total_s"], abs=1e-6)
        assert list(timeline["parts"]) == [name for _, name in PARTS]
        assert timeline["ttft_s"] < timeline["total_s"]
        gaps.append(measured_s - timeline["total_s"])
    connection.close()
    assert min(gaps) > -0.001, "the router cannot have taken longer than the client waited"
    assert _typical(gaps) < CLOSE_S, gaps


async def test_grpc_parts_sum_to_the_time_the_client_measured(cluster: Cluster) -> None:
    gaps = []
    async with AsyncClient(cluster.grpc_address) as client:
        for _ in range(NUM_REQUESTS):
            started_s = time.monotonic()
            completion = await client.generate(prompt="import os\n", max_tokens=24, temperature=0.0, ignore_eos=True)
            measured_s = time.monotonic() - started_s
            timeline = completion.timeline
            assert timeline is not None
            assert sum(timeline.parts().values()) == pytest.approx(timeline.total_s, abs=1e-6)
            gaps.append(measured_s - timeline.total_s)
    assert _typical(gaps) < CLOSE_S, gaps


def _metric(text: str, name: str, **labels: str) -> float:
    total = 0.0
    for line in text.splitlines():
        if line.startswith((f"{name}{{", f"{name} ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
            total += float(line.rsplit(" ", 1)[1])
    return total


def test_metrics_count_what_was_served(cluster: Cluster) -> None:
    def scrape() -> str:
        return httpx.get(f"{cluster.url}/metrics", timeout=10.0).text

    before = scrape()
    for _ in range(2):
        body: dict[str, Any] = BODY | {"prompt": "class Reader:\n    pass\n" * 8}
        assert httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60.0).status_code == 200
    assert httpx.post(f"{cluster.url}/v1/completions", json=BODY | {"n": 99}, timeout=60.0).status_code == 400
    asyncio.run(asyncio.sleep(0.5))  # a heartbeat
    after = scrape()

    def grown(name: str, **labels: str) -> float:
        return _metric(after, name, **labels) - _metric(before, name, **labels)

    assert grown("tandem_requests_total", outcome="length") == 2
    assert grown("tandem_ttft_seconds_count") == 2
    assert grown("tandem_tpot_seconds_count") == 2
    assert grown("tandem_output_tokens_total") == 48
    assert grown("tandem_cached_prompt_tokens_total") > 0
    assert grown("tandem_transfers_total") >= 2
    assert grown("tandem_transfer_bytes_total") > 0
    assert _metric(after, "tandem_kv_blocks", owner="leaked") == 0
    assert _metric(after, "tandem_kv_blocks", owner="free") > 0

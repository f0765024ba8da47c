"""Workers leave and are replaced while requests run; the answers stay the same. Deaths are in tests/chaos."""

import asyncio
import signal
import time
from pathlib import Path

import httpx
import pytest

from tandem import AsyncClient
from tandem.core.errors import UnavailableError
from tandem.core.session import Role
from tests.cluster.harness import Cluster, running_cluster

PROMPTS = [[7 + i, 40 + i, 99, 12] * 8 for i in range(8)]


async def answers(cluster: Cluster, max_tokens: int = 120) -> list[tuple[int, ...]]:
    async with AsyncClient(cluster.grpc_address) as client:
        tasks = [
            client.generate(token_ids=p, max_tokens=max_tokens, temperature=0.8, seed=i, ignore_eos=True, timeout_s=60)
            for i, p in enumerate(PROMPTS)
        ]
        return [tuple(completion.token_ids) for completion in await asyncio.gather(*tasks)]


async def until_it_decodes(cluster: Cluster, name: str, num_requests: int = len(PROMPTS)) -> None:
    """Until all requests are in the router, and that instance has some whose KV has arrived, for certain."""
    async with asyncio.timeout(20):
        while True:
            status = await asyncio.to_thread(cluster.status, name)
            has_all = await asyncio.to_thread(cluster.metric, "tandem_running_requests") == num_requests
            if has_all and status.running_requests and sum(link.transfers for link in status.links):
                return
            await asyncio.sleep(0.02)


@pytest.mark.timeout(180)
def test_a_worker_that_is_told_to_leave_finishes_what_it_has(built_in_model: Path, tmp_path: Path) -> None:
    with running_cluster(built_in_model, tmp_path, decode_transports=("auto", "auto")) as cluster:

        async def leave_under_load() -> list[tuple[int, ...]]:
            running = asyncio.create_task(answers(cluster, 600))
            await until_it_decodes(cluster, "decode-0")
            cluster.processes["decode-0"].send_signal(signal.SIGTERM)
            assert not running.done(), "the instance left too late to matter"
            return await running

        complete = asyncio.run(leave_under_load())
        assert [len(tokens) for tokens in complete] == [600] * len(PROMPTS)
        assert cluster.metric("tandem_retries_total") == 0
        assert cluster.processes.pop("decode-0").wait(20) == 0
        cluster.wait_ready(1, 1)


@pytest.mark.unmeasured
@pytest.mark.timeout(180)
def test_without_a_worker_there_is_an_answer_too(built_in_model: Path, tmp_path: Path) -> None:
    """No request is answered by silence: the only decode instance dies, none replaces it, and the client is told."""
    with running_cluster(built_in_model, tmp_path, router={"replacement_wait_s": 1.0}) as cluster:

        async def alone() -> None:
            async with AsyncClient(cluster.grpc_address) as client:
                task = asyncio.create_task(
                    client.generate(token_ids=[5, 6], max_tokens=3000, ignore_eos=True, timeout_s=60)
                )
                await until_it_decodes(cluster, "decode-0", 1)
                await asyncio.to_thread(cluster.kill, "decode-0")
                assert not task.done(), "the instance died too late to matter"
                started_s = time.monotonic()
                with pytest.raises(UnavailableError):
                    await task
                assert time.monotonic() - started_s < 10.0

        asyncio.run(alone())
        refused = httpx.post(f"{cluster.url}/v1/completions", json={"model": "tiny-python", "prompt": "x"}, timeout=10)
        assert refused.status_code == 503
        assert "error" in refused.json()
        cluster.start_worker("decode-1", Role.DECODE)
        cluster.wait_ready(1, 1)
        served = httpx.post(f"{cluster.url}/v1/completions", json={"model": "tiny-python", "prompt": "x"}, timeout=30)
        assert served.status_code == 200


@pytest.mark.unmeasured
@pytest.mark.timeout(180)
def test_a_stream_waits_for_the_replacement_of_its_only_decode_instance(built_in_model: Path, tmp_path: Path) -> None:
    with running_cluster(built_in_model, tmp_path) as cluster:
        undisturbed = asyncio.run(answers(cluster, 600))

        async def disturbed() -> list[tuple[int, ...]]:
            running = asyncio.create_task(answers(cluster, 600))
            await until_it_decodes(cluster, "decode-0")
            await asyncio.to_thread(cluster.kill, "decode-0")
            assert not running.done(), "the instance died too late to matter"
            cluster.start_worker("decode-1", Role.DECODE)  # takes seconds
            return await running

        assert asyncio.run(disturbed()) == undisturbed
        assert cluster.metric("tandem_retries_total") > 0, "no request lost its instance"


@pytest.mark.unmeasured
@pytest.mark.timeout(180)
def test_a_restarted_router_finds_its_workers_again(built_in_model: Path, tmp_path: Path) -> None:
    with running_cluster(built_in_model, tmp_path) as cluster:
        before = {status.instance_id for status in cluster.instances()}
        cluster.kill("router")
        cluster.start_router()
        cluster.wait_ready(1, 1)
        assert {status.instance_id for status in cluster.instances()} == before, "one was started anew"
        assert [len(tokens) for tokens in asyncio.run(answers(cluster, 5))] == [5] * len(PROMPTS)


@pytest.mark.timeout(180)
def test_no_lease_ends_while_its_reader_waits(built_in_model: Path, tmp_path: Path) -> None:
    """Decode has memory for one request, so that most KV waits for many leases. Each prompt is computed once."""
    engine = {"threads": 1, "kv_memory": "64MiB", "dtype": "float32"}
    prefill, decode = {"engine": engine, "lease_s": 0.3}, {"engine": engine | {"kv_memory": "2MiB"}}
    with running_cluster(built_in_model, tmp_path, prefill=prefill, decode=decode) as cluster:
        started_s = time.monotonic()
        long_answers = asyncio.run(answers(cluster, 600))
        assert time.monotonic() - started_s > 1.0, "nothing had to wait"
        assert [len(tokens) for tokens in long_answers] == [600] * len(PROMPTS)
        assert "lease of" not in cluster.log_path("prefill-0").read_text()
        computed = sum(status.computed_tokens for status in cluster.instances() if status.role is Role.PREFILL)
        assert computed == sum(map(len, PROMPTS))

"""Tests of `test_hosts.py`, run inside the network namespace of host a.

    host a, 10.77.0.1: router, prefill-a, decode-a   <--veth pair-->   host b, 10.77.0.2: prefill-b, decode-b

Workers on b listen on all interfaces and advertise their address.
"""

import asyncio
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem import AsyncClient
from tandem.core.clock import SystemClock
from tandem.core.session import Role
from tandem.deploy.trial import try_instances, ways_through
from tests.cluster.harness import START_TIMEOUT_S, Cluster
from tests.cluster.namespaces import Hosts

HOSTS = Hosts.of_environment()
ADDRESS_A, ADDRESS_B = HOSTS.link_address("a", "b"), HOSTS.link_address("b", "a")
ENGINE = {"threads": 1, "kv_memory": "64MiB", "dtype": "float32"}
PROMPTS = [[7 + i, 40 + i, 99, 12] * 8 for i in range(8)]
ROLES = {"prefill": Role.PREFILL, "decode": Role.DECODE}


class TwoHosts(Cluster):
    """Names of workers end with their host."""

    @property
    def control_address(self) -> str:
        return f"{ADDRESS_A}:{self.control_port}"

    def start_router(self) -> None:
        section = {"http": f"127.0.0.1:{self.http_port}", "grpc": self.grpc_address, "control": self.control_address}
        self.start("router", "tandem.router", {"router": section})

    def start_on(self, host: str, **settings: Any) -> None:
        for role in ROLES:
            self.start_one(f"{role}-{host}", **settings)

    def start_one(self, name: str, **settings: Any) -> None:
        role, _, host = name.partition("-")
        listen = {"listen": f"{ADDRESS_A}:0"} if host == "a" else {"listen": "0.0.0.0:0", "advertise": ADDRESS_B}
        config = {"name": name, "routers": [self.control_address], "heartbeat_s": 0.1, "role": role}
        settings = config | listen | {"instance": {"engine": ENGINE}} | settings
        self.start(name, f"tandem.{role}_worker", settings, HOSTS.inside(host))

    def kill_host_b(self) -> None:
        """As a loss of power: nobody is told."""
        HOSTS.cut("a", "b")
        for name in [name for name in self.processes if name.endswith("-b")]:
            self.kill(name)
        HOSTS.mend("a", "b")


@pytest.fixture(scope="module")
def model() -> Path:
    return Path(__file__).parents[2] / "models" / "tiny-python"


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    cluster = TwoHosts(model, tmp_path_factory.mktemp("hosts"))
    try:
        cluster.start_router()
        cluster.start_on("a")
        cluster.start_on("b")
        cluster.wait_ready(2, 2)
        yield cluster
        cluster.wait_idle(timeout_s=10.0)
    except BaseException:
        for process in cluster.processes.values():
            process.kill()
            process.wait(10)
        raise
    cluster.stop()


async def answers(cluster: Cluster, max_tokens: int) -> list[tuple[int, ...]]:
    async with AsyncClient(cluster.grpc_address) as client:
        tasks = [
            client.generate(token_ids=p, max_tokens=max_tokens, temperature=0.8, seed=i, ignore_eos=True, timeout_s=60)
            for i, p in enumerate(PROMPTS)
        ]
        return [tuple(completion.token_ids) for completion in await asyncio.gather(*tasks)]


def try_all_pairs(cluster: Cluster) -> None:
    for pair in ways_through(cluster.instances()):
        asyncio.run(try_instances(pair, cluster.model.name, Cluster.TOKEN, 30.0, SystemClock()))


def transports(cluster: Cluster) -> dict[tuple[str, str], str]:
    """Of links that have been used: names of both ends -> transport."""
    time.sleep(0.5)  # a few heartbeats
    found = {}
    for status in cluster.instances():
        if status.role is Role.DECODE:
            for link in status.links:
                ends = (link.peer_id, status.instance_id)
                found[tuple(end[: end.index("-") + 2] for end in ends)] = link.transport
    return found  # type: ignore[return-value]


def wait_for_log(cluster: Cluster, name: str, pattern: str) -> "re.Match[str]":
    until_s = time.monotonic() + START_TIMEOUT_S
    while (match := re.search(pattern, cluster.log_path(name).read_text())) is None:
        assert time.monotonic() < until_s, cluster.logs()
        time.sleep(0.1)
    return match


def until_it_decodes(cluster: Cluster, name: str) -> None:
    until_s = time.monotonic() + 30
    while not (cluster.metric("tandem_running_requests") == len(PROMPTS) and cluster.status(name).running_requests):
        assert time.monotonic() < until_s, cluster.logs()
        time.sleep(0.02)


def test_kv_moves_by_shared_memory_within_a_host_and_by_gloo_between_hosts(cluster: TwoHosts) -> None:
    try_all_pairs(cluster)
    assert transports(cluster) == {
        ("prefill-a", "decode-a"): "shared_memory",
        ("prefill-b", "decode-b"): "shared_memory",
        ("prefill-a", "decode-b"): "gloo",
        ("prefill-b", "decode-a"): "gloo",
    }
    assert {status.address.rpartition(":")[0] for status in cluster.instances()} == {ADDRESS_A, ADDRESS_B}


@pytest.mark.parametrize("fault", ["cut", "kill"])
def test_requests_survive_the_loss_of_a_host_and_it_comes_back(cluster: TwoHosts, fault: str) -> None:
    undisturbed = asyncio.run(answers(cluster, 600))

    async def disturbed() -> list[tuple[int, ...]]:
        running = asyncio.create_task(answers(cluster, 600))
        await asyncio.to_thread(until_it_decodes, cluster, "decode-b")
        if fault == "kill":
            await asyncio.to_thread(cluster.kill_host_b)
        else:
            HOSTS.cut("a", "b")
        assert not running.done(), "the host was lost too late to matter"
        return await running

    assert asyncio.run(disturbed()) == undisturbed
    cluster.wait_ready(1, 1)
    if fault == "kill":
        cluster.start_on("b")
    else:
        HOSTS.mend("a", "b")
    cluster.wait_ready(2, 2)
    try_all_pairs(cluster)
    assert asyncio.run(answers(cluster, 20)) == [tokens[:20] for tokens in undisturbed]


def test_other_model_files_on_a_host_are_named(cluster: TwoHosts, model: Path, tmp_path: Path) -> None:
    """With `model_hash` the worker refuses to start; without it the router says who has other files."""
    other = tmp_path / model.name
    shutil.copytree(model, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    right = wait_for_log(cluster, "prefill-a", r"the hash of the files of \S+ is (\w+)")[1]

    cluster.kill("prefill-b")
    cluster.wait_ready(1, 2)
    cluster.start_one("prefill-b", model=str(other), model_hash=right)
    assert cluster.processes["prefill-b"].wait(START_TIMEOUT_S) == 1
    text = (
        rf"the model files in {other} are not those of the cluster: their hash is \w+, and model_hash is {right[:16]}"
    )
    assert re.search(text, cluster.log_path("prefill-b").read_text())

    cluster.start_one("prefill-b", model=str(other))
    cluster.wait_ready(2, 2)
    warned = wait_for_log(cluster, "router", r"instance prefill-b-\w+ at (\S+):\d+ has other model files than")
    assert warned[1] == ADDRESS_B
    assert len({status.fingerprint for status in cluster.instances()}) == 2, "it forms no pairs with the others"
    answer = httpx.post(f"{cluster.url}/v1/completions", json={"model": "tiny-python", "prompt": "x"}, timeout=30)
    assert answer.status_code == 200
    cluster.processes["prefill-b"].send_signal(signal.SIGTERM)
    assert cluster.processes.pop("prefill-b").wait(30) == 0
    cluster.wait_ready(1, 2)
    cluster.start_one("prefill-b", model_hash=right)
    cluster.wait_ready(2, 2)

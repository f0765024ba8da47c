"""Tests of `test_hosts.py`, run inside the network namespace of host r.

                     host r: router, clients
                    /                       \\
    host a: prefill-a (2 ranks), decode-a -- host b: prefill-b, decode-b (2 ranks)

Each two hosts have a link of their own, so that the one between a and b can fail while the router reaches both. KV goes
over it by gloo from prefill-a to decode-b and from prefill-b to decode-a. The other two pairs share memory.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem import Client
from tandem.core.clock import SystemClock
from tandem.core.session import LinkStats, Role
from tandem.deploy.trial import try_instances, ways_through
from tandem.kv_transfer.link_totals import OTHER_PEERS
from tests.chaos.answers import Answer, answer, asks, tokens_of
from tests.chaos.faults import until
from tests.cluster.harness import Cluster, running_cluster
from tests.cluster.namespaces import Hosts

HOSTS = Hosts.of_environment()
ENGINE = {"threads": 1, "kv_memory": "64MiB", "dtype": "float32"}
WORKERS: dict[str, dict[str, Any]] = {
    "prefill-a": {"tp": 2, "threads": 2},
    "decode-a": {},
    "prefill-b": {"block_size": 32},
    "decode-b": {"pp": 2, "threads": 2, "block_size": 8},
}
PROMPT_TOKENS = 1500  # 3 MB of KV: 3 s at
MEGABITS_PER_S = 8
FOUND_WITHIN_S = 2.0  # a ping each second, and 0.8 s for its answer
FORGOTTEN_AFTER_S = 25.0  # a failure counts half every 5 s, and less than 1/16 is nothing
UNREACHABLE_WITHIN_S = 2.0  # by missing heartbeats
MARGIN_S = 3.0


class ThreeHosts(Cluster):
    """Names of workers end with their host."""

    @property
    def control_address(self) -> str:
        return f"{HOSTS.address('r')}:{self.control_port}"

    def start_router(self) -> None:
        section = {"http": f"127.0.0.1:{self.http_port}", "grpc": self.grpc_address, "control": self.control_address}
        self.start("router", "tandem.router", {"router": section})

    def start_one(self, name: str) -> None:
        role, _, host = name.partition("-")
        config = {
            "name": name,
            "role": role,
            "listen": f"{HOSTS.address(host)}:0",
            "routers": [self.control_address],
            "heartbeat_s": 0.1,
            "instance": {"engine": ENGINE | WORKERS[name]},
        }
        self.start(name, f"tandem.{role}_worker", config, HOSTS.inside(host))

    def links(self) -> dict[tuple[str, str], LinkStats]:
        """Hosts of prefill and decode instance -> totals of their link, where there is one."""
        return {
            (link.peer_id.split("-")[1], status.instance_id.split("-")[1]): link
            for status in self.instances()
            if status.role is Role.DECODE
            for link in status.links
            if link.peer_id != OTHER_PEERS
        }

    def try_all_pairs(self) -> None:
        ways = ways_through(self.instances())
        assert len(ways) == 4
        for pair in ways:
            asyncio.run(try_instances(pair, self.model.name, Cluster.TOKEN, 30.0, SystemClock()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreeHosts]:
    model = Path(__file__).parents[2] / "models" / "tiny-python"
    with running_cluster(
        model, tmp_path_factory.mktemp("hosts"), num_prefill=0, decode_transports=(), make=ThreeHosts
    ) as cluster:
        for name in WORKERS:
            cluster.start_one(name)
        cluster.wait_ready(2, 2)
        yield cluster


@pytest.fixture
def client(cluster: ThreeHosts) -> Iterator[Client]:
    with Client(cluster.grpc_address) as made:
        yield made


def bytes_over_link() -> tuple[int, int]:
    return HOSTS.sent_bytes("a", "b"), HOSTS.sent_bytes("b", "a")


def cut() -> None:
    HOSTS.cut("a", "b")


def lose() -> None:
    HOSTS.lose("a", "b")


def isolate() -> None:
    """All of host b: nobody is told."""
    HOSTS.lose("a", "b")
    HOSTS.lose("r", "b")


def in_mid_transfer(cluster: ThreeHosts, client: Client) -> tuple[list[Answer], list[tuple[int, ...]]]:
    """Requests on all four pairs, whose KV is on its way in both directions between a and b, and the tokens that they
    must get."""
    wanted = asks(8, prompt_tokens=PROMPT_TOKENS, max_tokens=100)
    undisturbed = tokens_of(client, wanted)
    cluster.try_all_pairs()
    cluster.wait_idle(5.0)
    assert {ends: link.transport for ends, link in cluster.links().items()} == {
        ("a", "a"): "shared_memory",
        ("b", "b"): "shared_memory",
        ("a", "b"): "gloo",
        ("b", "a"): "gloo",
    }
    HOSTS.slow("a", "b", MEGABITS_PER_S)
    before = bytes_over_link()
    answers = answer(client, wanted)
    kv_bytes = PROMPT_TOKENS * 2048

    def is_mid_transfer() -> bool:
        sent = [now - then for now, then in zip(bytes_over_link(), before, strict=True)]
        assert max(sent) < 4 * kv_bytes, f"only one direction is used: {sent}"
        return min(sent) > kv_bytes / 5

    until(is_mid_transfer, 20.0, "KV is on its way in both directions")
    return answers, undisturbed


@pytest.mark.parametrize("fault", [cut, lose, isolate])
def test_a_network_that_fails_during_transfers_costs_only_time(
    fault: Callable[[], None], cluster: ThreeHosts, client: Client
) -> None:
    answers, undisturbed = in_mid_transfer(cluster, client)
    pids = {name: process.pid for name, process in cluster.processes.items()}
    failed_s = time.monotonic()
    fault()
    if fault is isolate:
        until(
            lambda: {status.instance_id.split("-")[1] for status in cluster.instances()} == {"a"},
            UNREACHABLE_WITHIN_S + MARGIN_S,
            "the router knows that host b is gone",
        )
    assert [each.wait() for each in answers] == undisturbed
    attempts = sorted(each.num_attempts for each in answers)
    assert attempts[0] == 1, "every pair was disturbed"
    assert attempts[-1] > 1, "no request was disturbed"
    pauses_s = sorted(each.longest_gap_s(failed_s) for each in answers)
    print("pauses", [f"{pause_s:.2f}" for pause_s in pauses_s], "attempts", attempts)
    assert pauses_s[-1] < FOUND_WITHIN_S + MARGIN_S
    if fault is lose:
        time.sleep(FORGOTTEN_AFTER_S)  # the router's own memory; what decode instances report stays
    later = answer(client, asks(8, prompt_tokens=64, max_tokens=8))
    for each in later:
        each.wait()
    assert [each.num_attempts for each in later] == [1] * len(later), "a pair without a network was chosen"
    within_hosts = [link for (source, reader), link in cluster.links().items() if source == reader]
    assert [link.failures for link in within_hosts] == [0] * (1 if fault is isolate else 2)

    HOSTS.mend("a", "b")
    HOSTS.mend("r", "b")
    cluster.wait_ready(2, 2)
    cluster.try_all_pairs()
    until(lambda: len(cluster.links()) == 4, 5.0, "all pairs have links")
    before = {ends: link.transfers for ends, link in cluster.links().items()}

    def all_pairs_are_chosen() -> bool:
        """The router avoids a pair that has failed for half a minute."""
        time.sleep(2.0)
        assert tokens_of(client, asks(8, prompt_tokens=PROMPT_TOKENS, max_tokens=100)) == undisturbed
        return all(link.transfers > before[ends] + 1 for ends, link in cluster.links().items())

    until(all_pairs_are_chosen, 90.0, "all pairs exchange KV again")
    assert {name: process.pid for name, process in cluster.processes.items()} == pids
    cluster.wait_idle(5.0)

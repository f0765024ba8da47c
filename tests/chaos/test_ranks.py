"""A rank of an instance of several ranks dies or is stopped: that is the end of its instance, and of no other. KV that
is damaged between ranks is never used."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tandem import Client
from tandem.core.session import LinkStats, Role
from tests.chaos.answers import asks, tokens_of
from tests.chaos.faults import ChaosCluster, until
from tests.chaos.phases import SECTIONS, bring_into
from tests.cluster.harness import START_TIMEOUT_S, running_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

DEAD_WITHIN_S = 2.0
SHAPES = {  # no two instances have the same
    "prefill-0": {"tp": 2, "block_size": 16},
    "prefill-1": {"pp": 2, "block_size": 32},
    "decode-0": {"pp": 2, "block_size": 16},
    "decode-1": {"tp": 2, "block_size": 8},
}
TRANSPORTS = {"decode-1": "gloo"}
ENGINE = {"threads": 2, "kv_memory": "64MiB", "dtype": "float32"}
FAULTS = [
    pytest.param(0, signal.SIGKILL, id="rank 0 dies"),
    pytest.param(1, signal.SIGKILL, id="rank 1 dies"),
    pytest.param(1, signal.SIGSTOP, id="rank 1 is stopped"),
]


def start(cluster: ChaosCluster, name: str) -> None:
    role, transport = Role(name.partition("-")[0]), TRANSPORTS.get(name, "auto")
    cluster.start_worker(name, role, engine=ENGINE | SHAPES[name], transport=transport)


@pytest.fixture(scope="module")
def ranks_cluster(built_in_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosCluster]:
    with running_cluster(
        built_in_model,
        tmp_path_factory.mktemp("ranks"),
        num_prefill=0,
        decode_transports=(),
        make=ChaosCluster,
        **SECTIONS,
    ) as cluster:
        for name in SHAPES:
            start(cluster, name)
        cluster.wait_ready(2, 2)
        yield cluster


@pytest.fixture
def cluster(ranks_cluster: ChaosCluster) -> Iterator[ChaosCluster]:
    yield ranks_cluster
    ranks_cluster.heal()


def lose_rank(cluster: ChaosCluster, name: str, rank: int, fault: signal.Signals) -> None:
    """The whole instance ends, in time, and leaves no rank behind."""
    process = cluster.processes[name]
    ranks = [psutil.Process(process.pid)]
    ranks += sorted(ranks[0].children(), key=lambda child: child.create_time())
    lost_s = time.monotonic()
    ranks[rank].send_signal(fault)
    assert process.wait(10) == (-fault if rank == 0 else 1), cluster.log_path(name).read_text()
    assert time.monotonic() - lost_s < DEAD_WITHIN_S
    del cluster.processes[name]
    _, alive = psutil.wait_procs(ranks, timeout=DEAD_WITHIN_S)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []  # whoever inherits it may be slow


def check_pairs_again(cluster: ChaosCluster, client: Client, name: str) -> None:
    """A new instance of that name exchanges KV with those that were there all the time."""
    others = {each: process.pid for each, process in cluster.processes.items()}
    start(cluster, name)
    cluster.wait_known(START_TIMEOUT_S)
    new_id = cluster.instance_id(name)

    def has_exchanged() -> bool:
        tokens_of(client, asks(4, max_tokens=4))
        peers = {
            (status.instance_id, link.peer_id)
            for status in cluster.instances()
            for link in status.links
            if link.transfers
        }
        return any(new_id in pair for pair in peers)

    until(has_exchanged, 30.0, "the new instance exchanges KV")
    assert {each: cluster.processes[each].pid for each in others} == others, "nobody else was restarted"
    cluster.wait_idle(5.0)


def check_loss(name: str, phase: str, rank: int, fault: signal.Signals, cluster: ChaosCluster, client: Client) -> None:
    """The requests of the instance `name`, which are in that phase, get their tokens all the same."""
    disturbed = bring_into(phase, cluster, client)
    lose_rank(cluster, name, rank, fault)
    cluster.release_kv("prefill-0", "prefill-1")  # that of the lost one is for its successor
    disturbed.check_tokens()
    assert max(each.num_attempts for each in disturbed.answers) >= 2
    cluster.wait_idle(5.0)
    check_pairs_again(cluster, client, name)


@pytest.mark.parametrize(("rank", "fault"), FAULTS)
@pytest.mark.parametrize(("name", "phase"), [("prefill-0", "prefill"), ("prefill-1", "transfer")])
def test_a_lost_rank_of_a_prefill_instance_costs_only_time(
    name: str, phase: str, rank: int, fault: signal.Signals, cluster: ChaosCluster, client: Client
) -> None:
    check_loss(name, phase, rank, fault, cluster, client)


@pytest.mark.parametrize(("rank", "fault"), FAULTS)
@pytest.mark.parametrize(("name", "phase"), [("decode-0", "transfer"), ("decode-1", "decode")])
def test_a_lost_rank_of_a_decode_instance_loses_no_token(
    name: str, phase: str, rank: int, fault: signal.Signals, cluster: ChaosCluster, client: Client
) -> None:
    check_loss(name, phase, rank, fault, cluster, client)


def links_of(cluster: ChaosCluster, name: str) -> dict[str, LinkStats]:
    """By the name of the prefill instance at the other end."""
    status = cluster.find(name)
    assert status is not None
    return {link.peer_id.rpartition("-")[0]: link for link in status.links}


def test_kv_that_is_damaged_between_ranks_is_never_used(cluster: ChaosCluster, client: Client) -> None:
    """Of the ranks of prefill-0 to those of decode-1, which is of another shape and has blocks of another size."""
    wanted = asks(8, prompt_tokens=200, max_tokens=8)
    undisturbed = tokens_of(client, wanted)
    until(lambda: "prefill-0" in links_of(cluster, "decode-1"), 5.0, "the two have met")
    before = links_of(cluster, "decode-1")
    cluster.steps("prefill-0", "corrupt")

    def has_met_damage() -> bool:
        assert tokens_of(client, wanted) == undisturbed
        return links_of(cluster, "decode-1")["prefill-0"].failures > before["prefill-0"].failures

    until(has_met_damage, 30.0, "damaged KV has come to decode-1")
    assert links_of(cluster, "decode-1")["prefill-1"].failures == before["prefill-1"].failures
    cluster.steps("prefill-0", "")
    cluster.wait_idle(5.0)
    met = links_of(cluster, "decode-1")["prefill-0"].transfers

    def exchanges_again() -> bool:
        assert tokens_of(client, wanted) == undisturbed
        return links_of(cluster, "decode-1")["prefill-0"].transfers > met

    until(exchanges_again, 30.0, "the pair exchanges KV again")

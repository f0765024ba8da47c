"""All instances of a role are gone; colocated instances fail."""

import signal
from pathlib import Path

import httpx
import pytest

from tandem import Client
from tandem.core.session import Role
from tests.chaos.answers import answer, asks, tokens_of
from tests.chaos.faults import ChaosCluster, until
from tests.chaos.phases import CHUNK_TOKENS, PHASES, bring_into
from tests.chaos.test_ranks import ENGINE, lose_rank
from tests.cluster.harness import running_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.mark.parametrize("phase", PHASES)
def test_without_prefill_instances_decode_instances_do_both(phase: str, cluster: ChaosCluster, client: Client) -> None:
    disturbed = bring_into(phase, cluster, client)
    cluster.kill("prefill-0", "prefill-1")
    disturbed.check_tokens()
    attempts = [each.num_attempts for each in disturbed.answers]  # some were sent on to the other one that is dead
    assert max(attempts) <= 3
    assert min(attempts) >= (1 if phase in ("queued", "decode") else 2)
    if phase == "decode":
        assert max(attempts) == 1
    assert tokens_of(client, [each.ask for each in disturbed.answers]) == disturbed.undisturbed


def test_without_decode_instances_requests_wait_for_others_and_new_ones_are_refused(
    cluster: ChaosCluster, client: Client
) -> None:
    disturbed = bring_into("decode", cluster, client)
    cluster.kill("decode-0", "decode-1")
    until(lambda: not cluster.metric("tandem_instance_up", role="decode"), 5.0, "the router knows")
    refused = httpx.post(f"{cluster.url}/v1/completions", json={"model": "tiny-python", "prompt": "x"}, timeout=5.0)
    assert refused.status_code == 503
    assert "decode" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"]
    assert not any(each.is_done for each in disturbed.answers)
    cluster.start_worker("decode-0", Role.DECODE, transport="auto")
    disturbed.check_tokens()
    assert all(2 <= each.num_attempts <= 3 for each in disturbed.answers)


def test_without_decode_instances_colocated_ones_go_on(built_in_model: Path, tmp_path: Path) -> None:
    with (
        running_cluster(built_in_model, tmp_path, num_colocated=1, make=ChaosCluster) as cluster,
        Client(cluster.grpc_address) as client,
    ):
        wanted = asks(6)
        undisturbed = tokens_of(client, wanted)
        cluster.steps("decode-0", "sleep 0.05")
        running = answer(client, wanted)
        until(lambda: all(len(each.tokens) > 3 for each in running), 10.0, "all decode")
        status = cluster.find("decode-0")
        assert status is not None
        assert status.running_requests > 0, "the decode instance has none of them"
        cluster.kill("decode-0")
        assert [each.wait() for each in running] == undisturbed
        assert max(each.num_attempts for each in running) == 2
        assert tokens_of(client, wanted) == undisturbed


@pytest.mark.parametrize("fault", ["dies", "is stopped", "hangs in a step", "loses a rank", "a rank is stopped"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_colocated_instance_fails(phase: str, fault: str, built_in_model: Path, tmp_path: Path) -> None:
    """The instances that lose a rank are of two: stages in prefill, and halves of each layer in decode."""
    shape = {"pp" if phase == "prefill" else "tp": 2 if "rank" in fault else 1}
    with (
        running_cluster(
            built_in_model,
            tmp_path,
            num_prefill=0,
            decode_transports=(),
            num_colocated=2,
            colocated={"max_batch_tokens": CHUNK_TOKENS, "engine": ENGINE | shape},
            make=ChaosCluster,
        ) as cluster,
        Client(cluster.grpc_address) as client,
    ):
        wanted = asks(2, prompt_tokens=1024, max_tokens=8) if phase == "prefill" else asks(2)
        undisturbed = tokens_of(client, wanted)
        for index in range(2):
            cluster.steps(f"colocated-{index}", "sleep 0.1")
        running = answer(client, wanted)
        if phase == "prefill":
            until(lambda: _all_compute(cluster), 5.0, "both compute")
            assert not any(each.tokens for each in running)
        else:
            until(lambda: all(len(each.tokens) > 3 for each in running), 10.0, "both decode")
            assert not any(each.is_done for each in running)
        match fault:
            case "dies":
                cluster.kill("colocated-0")
            case "is stopped":
                cluster.stall("colocated-0")
            case "loses a rank":
                lose_rank(cluster, "colocated-0", 1, signal.SIGKILL)
            case "a rank is stopped":
                lose_rank(cluster, "colocated-0", 1, signal.SIGSTOP)
            case _:
                cluster.steps("colocated-0", "hang")
        assert [each.wait() for each in running] == undisturbed
        assert sorted(each.num_attempts for each in running) == [1, 2]
        cluster.heal()


def _all_compute(cluster: ChaosCluster) -> bool:
    return all(status.running_requests == 1 and status.uncomputed_tokens for status in cluster.instances())

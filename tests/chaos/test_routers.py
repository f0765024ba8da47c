"""The router dies, starts again, or has enough."""

import httpx
import pytest

from tandem import Client
from tandem.core.errors import OverloadedError, UnavailableError
from tests.chaos.answers import answer, asks, tokens_of
from tests.chaos.faults import ChaosCluster, until
from tests.chaos.phases import PHASES, bring_into
from tests.cluster.harness import running_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.mark.parametrize("phase", PHASES)
def test_a_router_death_ends_its_requests_and_nothing_else(phase: str, cluster: ChaosCluster, client: Client) -> None:
    disturbed = bring_into(phase, cluster, client)
    before = {status.instance_id for status in cluster.instances()}
    cluster.kill("router")
    for each in disturbed.answers:
        with pytest.raises(UnavailableError):
            each.wait(5.0)
    cluster.release_kv("prefill-0", "prefill-1")
    for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
        cluster.steps(name, "")
    cluster.start_router()
    cluster.wait_ready(2, 2)
    cluster.wait_idle(2.0)
    assert {status.instance_id for status in cluster.instances()} == before
    with Client(cluster.grpc_address) as new_client:
        wanted = [each.ask for each in disturbed.answers]
        assert tokens_of(new_client, wanted) == disturbed.undisturbed


def test_a_full_router_says_so_at_once(built_in_model, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with (
        running_cluster(built_in_model, tmp_path, router={"max_queue": 4}, make=ChaosCluster) as cluster,
        Client(cluster.grpc_address) as client,
    ):
        wanted = asks(4, max_tokens=40)
        undisturbed = tokens_of(client, wanted)
        cluster.steps("decode-0", "sleep 0.1")
        running = answer(client, wanted)
        until(lambda: all(each.tokens for each in running), 10.0, "the router is full")
        with pytest.raises(OverloadedError, match="try again later"):
            answer(client, asks(1))[0].wait(2.0)
        body = {"model": "tiny-python", "prompt": "x", "max_tokens": 4}
        refused = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=2.0)
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        assert cluster.metric("tandem_requests_total", outcome="overloaded") == 2
        cluster.steps("decode-0", "")
        assert [each.wait() for each in running] == undisturbed


def test_full_instances_say_so_at_once(built_in_model, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Both queues are full: a request is tried at both, and its client is told."""
    prefill = {"max_queue": 1, "max_batch_tokens": 128}
    engine = {"threads": 1, "kv_memory": "3MiB", "dtype": "float32"}  # memory for one prompt
    with (
        running_cluster(
            built_in_model,
            tmp_path,
            num_prefill=2,
            prefill=prefill | {"engine": engine},
            router={"outstanding_steps": 100},  # else they would wait in the router
            make=ChaosCluster,
        ) as cluster,
        Client(cluster.grpc_address) as client,
    ):
        wanted = asks(12, prompt_tokens=600, max_tokens=4)
        undisturbed = [tokens_of(client, [ask])[0] for ask in wanted]
        for index in range(2):
            cluster.steps(f"prefill-{index}", "sleep 0.2")
        tried = answer(client, wanted)
        refused = 0
        for each, expected in zip(tried, undisturbed, strict=True):
            try:
                assert each.wait() == expected
            except OverloadedError:
                refused += 1
        assert 0 < refused < len(wanted)
        assert cluster.metric("tandem_requests_total", outcome="overloaded") == refused

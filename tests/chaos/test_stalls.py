"""A process is stopped, or a step hangs, while the connections stay open: only the missing progress shows it."""

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tandem import Client
from tandem.core.session import Role
from tests.chaos.answers import asks, tokens_of
from tests.chaos.faults import ChaosCluster, until
from tests.chaos.phases import CHUNK_TOKENS, PHASES, PROMPT_TOKENS, STEP_S, bring_into

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

FOUND_WITHIN_S = 2.0
HUNG_WITHIN_S = 5.0  # ten times the longest recent step, which a busy machine may have made long
MARGIN_S = 1.5  # for the recomputation, on a busy machine
PROMPT_S = STEP_S * PROMPT_TOKENS / CHUNK_TOKENS


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("victim", [Role.PREFILL, Role.DECODE])
def test_a_stopped_instance_is_found(victim: Role, phase: str, cluster: ChaosCluster, client: Client) -> None:
    disturbed = bring_into(phase, cluster, client)
    stopped_s = time.monotonic()
    cluster.stall(f"{victim.value}-0")
    cluster.release_kv("prefill-0", "prefill-1")
    disturbed.check_tokens()
    attempts = sorted(each.num_attempts for each in disturbed.answers)
    if victim is Role.PREFILL:
        expected = {"queued": [1, 1, 2], "prefill": [1, 2], "transfer": [1, 2], "decode": [1, 1]}
    else:
        expected = {"queued": [1, 1, 2], "prefill": [1, 2], "transfer": [1, 2], "decode": [1, 2]}
    assert attempts == expected[phase]
    waited_s = max(each.longest_gap_s(stopped_s) for each in disturbed.answers)
    computed_s = PROMPT_S * 2 if phase in ("queued", "prefill") else 0.0
    assert waited_s < FOUND_WITHIN_S + computed_s + MARGIN_S
    cluster.resume(f"{victim.value}-0")
    until(lambda: cluster.is_usable(f"{victim.value}-0"), 10.0, "it is used again")
    cluster.wait_idle(2.0)


@pytest.mark.parametrize("victim", [Role.PREFILL, Role.DECODE])
def test_an_instance_whose_step_hangs_is_found(victim: Role, cluster: ChaosCluster, client: Client) -> None:
    """Its process answers everybody, and its heartbeats go on."""
    disturbed = bring_into(victim.value, cluster, client)
    name = f"{victim.value}-0"
    cluster.steps(name, "hang")
    hung_s = time.monotonic()
    found_s = until(lambda: not cluster.is_usable(name), 10.0, "it gets no more requests")
    assert found_s < HUNG_WITHIN_S + MARGIN_S
    began_s = time.monotonic()
    assert len(tokens_of(client, asks(4, max_tokens=4))) == 4
    assert time.monotonic() - began_s < 2.0, "new requests went to the instance that hangs"
    disturbed.check_tokens()
    assert sorted(each.num_attempts for each in disturbed.answers) == [1, 2]
    assert max(each.longest_gap_s(hung_s) for each in disturbed.answers) < HUNG_WITHIN_S + 2 * PROMPT_S + MARGIN_S


@pytest.mark.parametrize("phase", PHASES)
def test_a_stopped_router_condemns_nobody(phase: str, cluster: ChaosCluster, client: Client) -> None:
    disturbed = bring_into(phase, cluster, client)
    before = {status.instance_id for status in cluster.instances()}
    cluster.stall("router")
    cluster.release_kv("prefill-0", "prefill-1")
    time.sleep(3.5)  # more than the silence after which an instance counts as gone
    assert not all(each.is_done for each in disturbed.answers)
    cluster.resume("router")
    disturbed.check_tokens()
    assert [each.num_attempts for each in disturbed.answers] == [1] * len(disturbed.answers)
    assert "the router was stopped for 3." in cluster.log_path("router").read_text()
    assert {status.instance_id for status in cluster.instances()} == before
    cluster.wait_idle(2.0)


def test_a_router_that_was_stopped_for_long_loses_no_request(cluster: ChaosCluster) -> None:
    """All its sessions have ended, and it hears of that one after the other. Over HTTP, which has no pings."""
    bodies = [
        {"model": "tiny-python", "prompt": ask.token_ids, "max_tokens": ask.max_tokens, "seed": ask.seed}
        for ask in asks(6, prompt_tokens=PROMPT_TOKENS, max_tokens=24)
    ]

    def complete(body: dict[str, Any]) -> tuple[int, str]:
        salt = {"cache_salt": uuid.uuid4().hex}
        answer = httpx.post(f"{cluster.url}/v1/completions", json=body | salt, timeout=60.0)
        return answer.status_code, answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text

    with ThreadPoolExecutor(len(bodies)) as threads:
        undisturbed = list(threads.map(complete, bodies))
        assert {status for status, _ in undisturbed} == {200}
        for index in range(2):
            cluster.steps(f"prefill-{index}", f"sleep {STEP_S}")
            cluster.steps(f"decode-{index}", f"sleep {STEP_S}")
        running = [threads.submit(complete, body) for body in bodies]
        time.sleep(1.5)  # some decode, some are queued
        assert not any(each.done() for each in running)
        cluster.stall("router")
        time.sleep(7.0)
        cluster.resume("router")
        assert [each.result() for each in running] == undisturbed
    assert cluster.log_path("router").read_text().count("is over") == 4, "not all sessions have ended"
    assert cluster.metric("tandem_retries_total") > 0
    cluster.wait_idle(2.0)


@pytest.mark.parametrize("victim", [Role.PREFILL, Role.DECODE])
def test_a_slow_instance_is_not_condemned(victim: Role, cluster: ChaosCluster, client: Client) -> None:
    """Steps of half a second are no stall."""
    wanted = asks(2, prompt_tokens=256, max_tokens=6)
    undisturbed = tokens_of(client, wanted)
    retries = cluster.metric("tandem_retries_total")
    for index in range(2):
        cluster.steps(f"{victim.value}-{index}", "sleep 0.5")
    began_s = time.monotonic()
    assert tokens_of(client, wanted) == undisturbed
    assert time.monotonic() - began_s > 1.0, "it was not slow"
    assert cluster.metric("tandem_retries_total") == retries


@pytest.mark.parametrize("victim", [Role.PREFILL, Role.DECODE])
def test_an_instance_that_is_stopped_again_and_again_is_not_condemned(
    victim: Role, cluster: ChaosCluster, client: Client
) -> None:
    disturbed = bring_into(victim.value, cluster, client)
    for _ in range(4):
        cluster.stall(f"{victim.value}-0")
        time.sleep(0.6)
        cluster.resume(f"{victim.value}-0")
        time.sleep(0.2)
    disturbed.check_tokens()
    assert [each.num_attempts for each in disturbed.answers] == [1, 1]

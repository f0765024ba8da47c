"""What two processes say to each other waits, is slow, or is cut off, while both live."""

import time

import pytest

from tandem import Client
from tests.chaos.answers import asks, tokens_of
from tests.chaos.faults import ChaosCluster, until
from tests.chaos.phases import PHASES, bring_into

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

FOUND_WITHIN_S = 4.0  # a ping every 2 s, and 2 s for its answer
KV_FOUND_WITHIN_S = 2.0  # a ping each second, and 0.8 s for its answer
MARGIN_S = 2.0
READERS = ("decode-0", "decode-1")


@pytest.mark.parametrize("mode", ["stall", "refuse"])
def test_a_transfer_whose_link_fails_is_made_elsewhere(mode: str, cluster: ChaosCluster, client: Client) -> None:
    """The links from prefill-0 stay as they are or are cut; those from prefill-1 heal."""
    disturbed = bring_into("transfer", cluster, client)
    retries = cluster.metric("tandem_retries_total")
    failed_s = time.monotonic()
    for reader in READERS:
        cluster.link(reader, "prefill-0", mode)
    cluster.release_kv("prefill-1")
    disturbed.check_tokens()
    attempts = [each.num_attempts for each in disturbed.answers]
    assert 1 in attempts
    assert max(attempts) > 1
    assert cluster.metric("tandem_retries_total") - retries == sum(attempts) - len(attempts)
    waited_s = max(each.longest_gap_s(failed_s) for each in disturbed.answers)
    assert waited_s < (KV_FOUND_WITHIN_S if mode == "stall" else 0.0) + MARGIN_S
    cluster.wait_idle(2.0)


def test_a_pair_that_cannot_link_is_avoided(cluster: ChaosCluster, client: Client) -> None:
    """Nobody can read the KV of prefill-0. Requests that come are answered by the other pairs, and soon at once: a
    decode instance has told that it lost its connection."""
    wanted = asks(16, max_tokens=8)
    undisturbed = tokens_of(client, wanted)
    cluster.wait_idle(5.0)
    retries = cluster.metric("tandem_retries_total")
    for reader in READERS:
        cluster.link(reader, "prefill-0", "refuse")
    assert tokens_of(client, wanted) == undisturbed
    first = cluster.metric("tandem_retries_total") - retries
    lost = cluster.instance_id("prefill-0")
    # One of them may have had no need to read from there, since the router avoids it by now.
    until(lambda: lost in unreachable(cluster), 5.0, "a decode instance has told what it cannot read")
    assert tokens_of(client, wanted) == undisturbed
    assert cluster.metric("tandem_retries_total") - retries - first < len(wanted) / 4, "the pair is chosen again"
    for reader in READERS:
        cluster.link(reader, "prefill-0", "pass")
    until(lambda: lost not in unreachable(cluster), 10.0, "they can read from there again")
    cluster.wait_idle(2.0)


def unreachable(cluster: ChaosCluster) -> list[str]:
    """What the readers cannot reach. Instances that have died are among it for ten minutes."""
    statuses = [status for reader in READERS if (status := cluster.find(reader)) is not None]
    return [peer for status in statuses for peer in status.unreachable_peers]


def test_without_any_link_decode_instances_compute_prompts(cluster: ChaosCluster, client: Client) -> None:
    wanted = asks(8, max_tokens=8)
    undisturbed = tokens_of(client, wanted)
    for name in ("prefill-0", "prefill-1"):
        for reader in READERS:
            cluster.link(reader, name, "refuse")
    assert tokens_of(client, wanted) == undisturbed
    transfers = cluster.metric("tandem_transfers_total")
    assert tokens_of(client, wanted) == undisturbed
    assert cluster.metric("tandem_transfers_total") == transfers
    cluster.wait_idle(2.0)


def test_a_slow_link_costs_only_time(cluster: ChaosCluster, client: Client) -> None:
    wanted = asks(8, max_tokens=8)
    undisturbed = tokens_of(client, wanted)
    retries = cluster.metric("tandem_retries_total")
    transfers = cluster.metric("tandem_transfers_total")
    for name in ("prefill-0", "prefill-1"):
        for reader in READERS:
            cluster.link(reader, name, "slow")
    assert tokens_of(client, wanted) == undisturbed
    assert cluster.metric("tandem_retries_total") == retries
    until(lambda: cluster.metric("tandem_transfers_total") - transfers == len(wanted), 5.0, "all were transferred")


@pytest.mark.parametrize("mode", ["stall", "refuse"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_router_that_cannot_reach_an_instance_goes_elsewhere(
    phase: str, mode: str, cluster: ChaosCluster, client: Client
) -> None:
    """The instance still reports: only its session stands still, or ends. Where it stands still during a transfer, the
    instance has read the KV by the time it is given up. The next reader finds that out, and the prompt is computed
    again."""
    victim = "decode-0" if phase in ("transfer", "decode") else "prefill-0"
    disturbed = bring_into(phase, cluster, client)
    failed_s = time.monotonic()
    cluster.link("router", victim, mode)
    cluster.release_kv("prefill-0", "prefill-1")
    disturbed.check_tokens()
    attempts = sorted(each.num_attempts for each in disturbed.answers)
    more = 3 if (phase, mode) == ("transfer", "stall") else 2
    assert attempts == ([1, 1, more] if phase == "queued" else [1, more])
    waited_s = max(each.longest_gap_s(failed_s) for each in disturbed.answers)
    assert waited_s < (FOUND_WITHIN_S if mode == "stall" else 0.0) + 2 * MARGIN_S
    cluster.link("router", victim, "pass")
    until(lambda: cluster.is_usable(victim), 10.0, "it is used again")
    cluster.wait_idle(2.0)

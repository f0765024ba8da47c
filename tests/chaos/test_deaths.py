"""A process dies, in each phase of the requests it has."""

import time
from typing import Any

import pytest

from tandem import Client
from tests.chaos.faults import ChaosCluster
from tests.chaos.phases import PHASES, bring_into

pytestmark = [pytest.mark.timeout(180), pytest.mark.unmeasured]

FOUND_WITHIN_S = 2.0  # of a death, with its recomputation; the connection's end is its sign
FREED_WITHIN_S = 2.0


def _phases(quick: str) -> list[Any]:
    """All, of which only `quick` runs in the gate."""
    return [pytest.param(phase, marks=() if phase == quick else pytest.mark.slow) for phase in PHASES]


@pytest.mark.parametrize("phase", _phases(quick="prefill"))
def test_a_prefill_death_costs_only_time(phase: str, cluster: ChaosCluster, client: Client) -> None:
    disturbed = bring_into(phase, cluster, client)
    retries = cluster.metric("tandem_retries_total")
    cluster.kill("prefill-0")
    cluster.release_kv("prefill-1")
    disturbed.check_tokens()
    attempts = sorted(each.num_attempts for each in disturbed.answers)
    expected = {"queued": [1, 1, 2], "prefill": [1, 2], "transfer": [1, 2], "decode": [1, 1]}
    assert attempts == expected[phase]
    assert cluster.metric("tandem_retries_total") - retries == sum(attempts) - len(attempts)
    cluster.wait_idle(FREED_WITHIN_S)


@pytest.mark.parametrize("phase", _phases(quick="decode"))
def test_a_decode_death_loses_no_token(phase: str, cluster: ChaosCluster, client: Client) -> None:
    disturbed = bring_into(phase, cluster, client)
    retries = cluster.metric("tandem_retries_total")
    before = [len(each.tokens) for each in disturbed.answers]
    computed_tokens = _computed_tokens(cluster)
    killed_s = time.monotonic()
    cluster.kill("decode-0")
    cluster.release_kv("prefill-0", "prefill-1")
    disturbed.check_tokens()
    attempts = sorted(each.num_attempts for each in disturbed.answers)
    expected = {"queued": [1, 1, 2], "prefill": [1, 2], "transfer": [1, 2], "decode": [1, 2]}
    assert attempts == expected[phase]
    assert cluster.metric("tandem_retries_total") - retries == sum(attempts) - len(attempts)
    if phase == "decode":
        assert min(before) >= 4
        assert max(each.longest_gap_s(killed_s) for each in disturbed.answers) < FOUND_WITHIN_S
    cluster.wait_idle(FREED_WITHIN_S)
    if phase == "transfer":
        assert _computed_tokens(cluster) == computed_tokens, "a prompt was computed again, though its KV is there"


def _computed_tokens(cluster: ChaosCluster) -> int:
    """By the prefill instances."""
    statuses = [cluster.find(name) for name in ("prefill-0", "prefill-1")]
    return sum(status.computed_tokens for status in statuses if status is not None)

"""Steps that fail while the process lives."""

import pytest

from tandem import Client
from tandem.core.errors import UnavailableError
from tandem.core.session import Role
from tests.chaos.answers import asks, tokens_of
from tests.chaos.faults import ChaosCluster, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

FAILED_STEPS = 3  # in a row, and the process ends


@pytest.mark.parametrize("victim", [Role.PREFILL, Role.DECODE])
def test_an_engine_whose_steps_fail_attracts_no_traffic(victim: Role, cluster: ChaosCluster, client: Client) -> None:
    wanted = asks(24, max_tokens=8)
    undisturbed = tokens_of(client, wanted)
    cluster.wait_idle(5.0)
    retries = cluster.metric("tandem_retries_total")
    cluster.steps(f"{victim.value}-0", "fail")
    answers = []
    for ask in wanted:  # one after the other: an instance that fails at once is always the one with the least to do
        answers += tokens_of(client, [ask])
    assert answers == undisturbed
    failed = cluster.metric("tandem_retries_total") - retries
    assert 0 < failed <= FAILED_STEPS
    if failed == FAILED_STEPS:
        until(lambda: cluster.processes[f"{victim.value}-0"].poll() is not None, 5.0, "the process ends")
    cluster.steps(f"{victim.value}-0", "")


@pytest.mark.parametrize("victim", [Role.PREFILL, Role.DECODE])
def test_an_engine_whose_steps_fail_is_ended(victim: Role, cluster: ChaosCluster, client: Client) -> None:
    """By itself, so that its controller starts another one. It is the only one of its role: nobody is avoided."""
    name = f"{victim.value}-0"
    cluster.kill(f"{victim.value}-1")
    cluster.wait_known(5.0)
    cluster.steps(name, "fail")
    ended = cluster.processes[name]
    with pytest.raises(UnavailableError):
        tokens_of(client, asks(1))
    until(lambda: ended.poll() is not None, 10.0, "the process ends")
    assert ended.returncode not in (0, None)
    assert "fails because a test wants it to" in cluster.log_path(name).read_text()


def test_a_step_without_memory_is_computed_elsewhere(cluster: ChaosCluster, client: Client) -> None:
    wanted = asks(8, max_tokens=40)
    undisturbed = tokens_of(client, wanted)
    retries = cluster.metric("tandem_retries_total")
    cluster.steps("decode-0", "no memory")
    assert tokens_of(client, wanted) == undisturbed
    assert cluster.metric("tandem_retries_total") > retries, "no batch failed"
    assert "finds no memory because a test wants it to" in cluster.log_path("decode-0").read_text()

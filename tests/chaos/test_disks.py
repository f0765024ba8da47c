"""No space is left on a disk or in memory."""

from pathlib import Path

import pytest

from tandem import Client
from tandem.core.session import Role
from tests.chaos.answers import answer, asks, tokens_of
from tests.chaos.faults import ChaosCluster
from tests.cluster.harness import Cluster, running_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_a_full_disk_stops_no_request(built_in_model: Path, tmp_path: Path) -> None:
    """Every write of every process into its log fails."""
    for name in ("router", "prefill-0", "decode-0"):
        (tmp_path / f"{name}.log").symlink_to("/dev/full")
    with (
        running_cluster(built_in_model, tmp_path, make=_WithoutLogs) as cluster,
        Client(cluster.grpc_address) as client,
    ):
        wanted = asks(8)
        assert [len(tokens) for tokens in tokens_of(client, wanted)] == [60] * 8
        cancelled = answer(client, wanted)
        for each in cancelled:
            each.cancel()
        cluster.wait_idle(2.0)
        cluster.kill("decode-0")
        cluster.start_worker("decode-0", Role.DECODE)
        assert [len(tokens) for tokens in tokens_of(client, wanted)] == [60] * 8


class _WithoutLogs(Cluster):
    def logs(self) -> str:
        return "the logs are full"


def test_kv_memory_that_runs_out_costs_only_time(built_in_model: Path, tmp_path: Path) -> None:
    engine = {"threads": 1, "kv_memory": "2MiB", "dtype": "float32"}  # for 512 tokens
    with (
        running_cluster(
            built_in_model, tmp_path, decode={"engine": engine}, router={"replacement_wait_s": 5.0}, make=ChaosCluster
        ) as cluster,
        Client(cluster.grpc_address) as client,
    ):
        wanted = asks(6, max_tokens=300)
        undisturbed = [tokens_of(client, [ask])[0] for ask in wanted]
        assert tokens_of(client, wanted) == undisturbed
        assert cluster.metric("tandem_preemptions_total") > 0, "the memory was enough"
        assert cluster.metric("tandem_retries_total") == 0

"""No space is left on a disk or in memory."""

from pathlib import Path

import psutil
import pytest

from tandem import Client
from tests.chaos.answers import answer, asks, tokens_of
from tests.chaos.faults import ChaosCluster
from tests.cluster.harness import running_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_a_full_disk_stops_no_request(built_in_model: Path, tmp_path: Path) -> None:
    """Every write of every process into a file fails, from the moment on when all have started."""
    with running_cluster(built_in_model, tmp_path) as cluster, Client(cluster.grpc_address) as client:
        wanted = asks(8)
        undisturbed = tokens_of(client, wanted)
        lengths = {}
        for name, process in cluster.processes.items():
            psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (1, psutil.RLIM_INFINITY))
            lengths[name] = cluster.log_path(name).stat().st_size
        assert tokens_of(client, wanted) == undisturbed
        for each in answer(client, wanted):
            each.cancel()
        cluster.wait_idle(2.0)
        assert {name: cluster.log_path(name).stat().st_size for name in lengths} == lengths, "something was written"
        assert cluster.metric("tandem_requests_total", outcome="length") == 16


def test_kv_memory_that_runs_out_costs_only_time(built_in_model: Path, tmp_path: Path) -> None:
    engine = {"threads": 1, "kv_memory": "2MiB", "dtype": "float32"}  # for 1024 tokens
    with (
        running_cluster(
            built_in_model, tmp_path, decode={"engine": engine}, router={"replacement_wait_s": 5.0}, make=ChaosCluster
        ) as cluster,
        Client(cluster.grpc_address) as client,
    ):
        wanted = asks(3, max_tokens=900)
        undisturbed = [tokens_of(client, [ask])[0] for ask in wanted]
        assert tokens_of(client, wanted) == undisturbed
        assert cluster.metric("tandem_preemptions_total") > 0, "the memory was enough"
        assert cluster.metric("tandem_retries_total") == 0

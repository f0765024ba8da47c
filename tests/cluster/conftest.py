"""Models that clusters are started on, and a cluster that tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.harness import Cluster, running_cluster

BUILT_IN = Path(__file__).parents[2] / "models" / "tiny-python"


@pytest.fixture(scope="session")
def built_in_model() -> Path:
    return BUILT_IN


@pytest.fixture(scope="session")
def shared_cluster(built_in_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One prefill worker; two decode workers, one on each transport between CPUs. Long prompts go in chunks, and their
    KV is streamed."""
    with running_cluster(
        built_in_model,
        tmp_path_factory.mktemp("cluster"),
        decode_transports=("shared_memory", "gloo"),
        prefill={"max_batch_tokens": 512},
        decode={"stream_kv_from": "256KiB"},
        router={
            "slo": [
                {"name": "easy", "ttft_s": 60.0, "tpot_s": 60.0},
                {"name": "now-or-never", "ttft_s": 1e-4, "tpot_s": 60.0, "if_unmet": "refuse"},
                {"name": "soon", "ttft_s": 1e-4, "tpot_s": 60.0},
            ]
        },
    ) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster, idle before and after the test."""
    yield shared_cluster
    shared_cluster.wait_idle(timeout_s=5.0)

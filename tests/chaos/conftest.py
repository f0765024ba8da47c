"""The cluster of these tests: two prefill and two decode instances, healed after each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem import Client
from tests.chaos.faults import ChaosCluster
from tests.chaos.phases import SECTIONS
from tests.cluster.harness import running_cluster

BUILT_IN = Path(__file__).parents[2] / "models" / "tiny-python"


@pytest.fixture(scope="session")
def built_in_model() -> Path:
    return BUILT_IN


@pytest.fixture(scope="session")
def shared_cluster(built_in_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosCluster]:
    with running_cluster(
        built_in_model,
        tmp_path_factory.mktemp("chaos"),
        num_prefill=2,
        decode_transports=("auto", "auto"),
        make=ChaosCluster,
        **SECTIONS,
    ) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: ChaosCluster) -> Iterator[ChaosCluster]:
    """Whole and idle before the test, and again after it: every block has an owner, nothing is left running."""
    yield shared_cluster
    shared_cluster.heal()


@pytest.fixture
def client(cluster: ChaosCluster) -> Iterator[Client]:
    with Client(cluster.grpc_address) as made:
        yield made

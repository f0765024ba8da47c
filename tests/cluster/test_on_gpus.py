"""Clusters on GPUs: their tokens are those of transformers. Not run where the project is developed, without GPUs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.core.parallel import ParallelShape
from tests.cluster.harness import running_cluster
from tests.cluster.test_shapes import check

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

ONLY_COLOCATED: dict[str, Any] = {"num_prefill": 0, "decode_transports": (), "num_colocated": 1}
ENGINE = {"kv_memory": "256MiB", "dtype": "float32"}


def needs_gpus(count: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPUs")


def on(device: str, **settings: Any) -> dict[str, Any]:
    return {"engine": ENGINE | {"device": device} | settings}


@needs_gpus(1)
def test_a_colocated_instance(built_in_model: Path, tmp_path: Path) -> None:
    with running_cluster(built_in_model, tmp_path, **ONLY_COLOCATED, colocated=on("cuda:0")) as cluster:
        check(cluster, num_prompts=16, longest=1000)


@needs_gpus(2)
def test_kv_over_nccl(built_in_model: Path, tmp_path: Path) -> None:
    with running_cluster(
        built_in_model, tmp_path, decode_transports=("nccl",), prefill=on("cuda:0"), decode=on("cuda:1")
    ) as cluster:
        check(cluster, num_prompts=16, longest=1000)
        transports = {link.transport for status in cluster.instances() for link in status.links if link.transfers}
        assert transports == {"nccl"}


@needs_gpus(2)
@pytest.mark.parametrize("shape", [ParallelShape(tp=2), ParallelShape(pp=2)], ids=str)
def test_an_instance_of_two_ranks(shape: ParallelShape, built_in_model: Path, tmp_path: Path) -> None:
    settings = on("cuda", tp=shape.tp, pp=shape.pp)
    with running_cluster(built_in_model, tmp_path, **ONLY_COLOCATED, colocated=settings) as cluster:
        check(cluster, num_prompts=16, longest=1000)


@needs_gpus(3)
@pytest.mark.parametrize("wide", ["prefill", "decode"])
@pytest.mark.parametrize("shape", [ParallelShape(tp=2), ParallelShape(pp=2)], ids=str)
def test_kv_of_an_instance_of_two_ranks(wide: str, shape: ParallelShape, built_in_model: Path, tmp_path: Path) -> None:
    """Rank 0 relays the KV of the other GPU."""
    sections = {"prefill": on("cuda:2"), "decode": on("cuda:2"), wide: on("cuda", tp=shape.tp, pp=shape.pp)}
    with running_cluster(built_in_model, tmp_path, decode_transports=("nccl",), **sections) as cluster:
        check(cluster, num_prompts=16, longest=1000)
        assert sum(link.transfers for status in cluster.instances() for link in status.links) > 0

"""Prefill and decode instances of other shapes and block sizes: their tokens are those of transformers."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from tandem.core.session import Role
from tests.cluster.harness import Cluster, running_cluster
from tests.cluster.test_ranks import lose_a_rank
from tests.cluster.test_same_tokens import check_answers, cluster_tokens, prompts

ENGINE = {"threads": 1, "kv_memory": "32MiB", "dtype": "float32"}


def engine(tp: int, pp: int, block_size: int) -> dict[str, Any]:
    return ENGINE | {"tp": tp, "pp": pp, "threads": tp * pp, "block_size": block_size}


def check(cluster: Cluster, num_prompts: int, longest: int) -> None:
    prompt_ids = [token_ids for token_ids in prompts(4000) if len(token_ids) < longest][:num_prompts]
    answers = asyncio.run(cluster_tokens(cluster, prompt_ids))
    check_answers(cluster, prompt_ids, answers)
    cluster.wait_idle(timeout_s=5.0)


@pytest.mark.timeout(300)
def test_instances_of_one_role_have_other_shapes(built_in_model: Path, tmp_path: Path) -> None:
    """Two prefill instances of several ranks, with blocks of other sizes, and a decode instance of one. Then one of the
    prefill instances loses a rank."""
    with running_cluster(built_in_model, tmp_path, num_prefill=0, decode_transports=()) as cluster:
        cluster.start_worker("prefill-0", Role.PREFILL, engine=engine(2, 1, 16))
        cluster.start_worker("prefill-1", Role.PREFILL, engine=engine(1, 2, 32))
        cluster.start_worker("decode-0", Role.DECODE, engine=engine(1, 1, 16))
        cluster.wait_ready(2, 1)
        check(cluster, num_prompts=12, longest=300)
        (decode,) = (status for status in cluster.instances() if status.role is Role.DECODE)
        assert {link.peer_id[:9] for link in decode.links if link.transfers} == {"prefill-0", "prefill-1"}
        lose_a_rank(cluster, "prefill-0", signal.SIGKILL)
        check(cluster, num_prompts=4, longest=100)


PAIRS = [
    ((1, 1), (2, 1)),
    ((2, 1), (1, 1)),
    ((1, 2), (2, 1)),
    ((2, 1), (1, 2)),
    ((2, 2), (1, 1)),
    ((1, 3), (3, 1)),
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sizes", [(16, 16), (8, 32)], ids=str)
@pytest.mark.parametrize("shapes", PAIRS, ids=lambda shapes: f"{shapes[0]} to {shapes[1]}")
def test_pair(
    shapes: tuple[tuple[int, int], tuple[int, int]], sizes: tuple[int, int], built_in_model: Path, tmp_path: Path
) -> None:
    """Over shared memory and over gloo."""
    with running_cluster(
        built_in_model,
        tmp_path,
        decode_transports=("shared_memory", "gloo"),
        prefill={"engine": engine(*shapes[0], sizes[0]), "max_batch_tokens": 256},
        decode={"engine": engine(*shapes[1], sizes[1])},
    ) as cluster:
        check(cluster, num_prompts=32, longest=1000)
        transports = {link.transport for status in cluster.instances() for link in status.links if link.transfers}
        assert transports == {"shared_memory", "gloo"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_pair_that_cannot_exchange_kv_meets_once(built_in_model: Path, tmp_path: Path) -> None:
    """One decode instance reads KV over NCCL only, which the prefill instance does not have."""
    with running_cluster(
        built_in_model,
        tmp_path,
        decode_transports=("nccl", "auto"),
        prefill={"engine": engine(2, 1, 16)},
    ) as cluster:
        for _ in range(3):
            check(cluster, num_prompts=6, longest=100)
        assert cluster.metric("tandem_retries_total") >= 1
        met = cluster.metric("tandem_retries_total")
        check(cluster, num_prompts=12, longest=100)
        assert cluster.metric("tandem_retries_total") == met
        log = cluster.log_path("decode-0").read_text()
        assert "cannot be read here: the two workers have no transport for KV in common" in log

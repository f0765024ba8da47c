"""Colocated instances of several ranks serve the tokens of transformers, and end as a whole when a rank is lost."""

import asyncio
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.harness import Cluster, running_cluster
from tests.cluster.test_same_tokens import check_answers, cluster_tokens, prompts

LOST_WITHIN_S = 2.0
ENGINE = {"threads": 2, "kv_memory": "64MiB", "dtype": "float32"}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("shape", "fault"),
    [
        ({"tp": 2}, signal.SIGKILL),
        ({"pp": 2}, signal.SIGSTOP),
        ({"tp": 2, "pp": 2}, signal.SIGKILL),
    ],
    ids=str,
)
def test_tokens_then_the_loss_of_a_rank(
    built_in_model: Path, tmp_path: Path, shape: dict[str, int], fault: signal.Signals
) -> None:
    with running_cluster(
        built_in_model,
        tmp_path,
        num_prefill=0,
        decode_transports=(),
        num_colocated=1,
        colocated={"engine": ENGINE | shape, "max_batch_tokens": 256},
    ) as cluster:
        prompt_ids = [token_ids for token_ids in prompts(4000) if len(token_ids) < 700][:24]
        answers = asyncio.run(cluster_tokens(cluster, prompt_ids))
        check_answers(cluster, prompt_ids, answers)
        cluster.wait_idle(timeout_s=5.0)
        lose_a_rank(cluster, "colocated-0", fault)


def lose_a_rank(cluster: Cluster, name: str, fault: signal.Signals) -> None:
    """Rank 0 ends with status 1, and no rank stays behind."""
    process = cluster.processes.pop(name)
    followers = psutil.Process(process.pid).children()
    followers[-1].send_signal(fault)
    lost_s = time.monotonic()
    assert process.wait(10) == 1, cluster.log_path(name).read_text()
    assert time.monotonic() - lost_s < LOST_WITHIN_S
    _, alive = psutil.wait_procs(followers, timeout=LOST_WITHIN_S)
    assert alive == []

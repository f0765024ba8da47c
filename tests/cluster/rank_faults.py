"""Tests of `test_hosts.py`, run inside the network namespace of host a: an instance with ranks on two hosts
loses one."""

import asyncio
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos.faults import until
from tests.cluster.rank_cluster import HOSTS, RankHosts, check, running
from tests.cluster.test_same_tokens import check_answers, cluster_tokens, prompts

LOST_WITHIN_S = 2.0
CUT_WITHIN_S = 3.0  # the kernel gives a host that does not answer up after 2 s
MARGIN_S = 3.0  # for a busy machine


def kill(cluster: RankHosts, name: str) -> None:
    cluster.ranks_on_b(name)[0].kill()


def stop(cluster: RankHosts, name: str) -> None:
    cluster.ranks_on_b(name)[0].suspend()


def kill_host_process(cluster: RankHosts, name: str) -> None:
    cluster.processes[f"{name} ranks"].kill()


def kill_rank_0(cluster: RankHosts, name: str) -> None:
    cluster.processes[name].kill()


def cut(cluster: RankHosts, name: str) -> None:
    HOSTS.cut("a", "b")


def lose(cluster: RankHosts, name: str) -> None:
    """Nobody is told."""
    HOSTS.lose("a", "b")


@pytest.mark.parametrize("fault", [kill, stop, kill_host_process, kill_rank_0, cut, lose])
def test_an_instance_that_loses_a_rank_or_a_host_ends(fault: Any, tmp_path: Path) -> None:
    """While it computes, on both hosts, and its requests go on elsewhere."""
    name = "colocated-0"
    with running(tmp_path, colocated_0=(1, 2), colocated_1=(1, 1)) as cluster:
        prompt_ids = [token_ids for token_ids in prompts(4000) if 100 < len(token_ids) < 700][:16]

        async def disturbed() -> list[list[int]]:
            asking = asyncio.create_task(cluster_tokens(cluster, prompt_ids))
            await asyncio.to_thread(until, lambda: bool(cluster.status(name).running_requests), 20.0, "it computes")
            lost_s = time.monotonic()
            ranks = cluster.ranks_on_b(name)
            fault(cluster, name)
            within_s = (CUT_WITHIN_S if fault in (cut, lose) else LOST_WITHIN_S) + MARGIN_S
            for process in (cluster.processes.pop(name), cluster.processes.pop(f"{name} ranks")):
                assert await asyncio.to_thread(process.wait, 20) != 0, cluster.logs()
                assert time.monotonic() - lost_s < within_s
            _, alive = psutil.wait_procs(ranks, timeout=within_s)
            assert [rank for rank in alive if rank.status() != psutil.STATUS_ZOMBIE] == []
            return await asking

        try:
            check_answers(cluster, prompt_ids, asyncio.run(disturbed()))
        finally:
            HOSTS.mend("a", "b")
        cluster.wait_ready(0, 0, 1)
        cluster.start_instance(name, (1, 2))
        cluster.wait_ready(0, 0, 2)
        check(cluster, 8)

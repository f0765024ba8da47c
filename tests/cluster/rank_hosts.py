"""Tests of `test_hosts.py`, run inside the network namespace of host a: instances with ranks on two hosts."""

import asyncio
import os
import shutil
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tandem.core.session import Role
from tandem.worker.ranks.joining import JoinRequest, Purpose, join
from tests.chaos.faults import until
from tests.cluster.harness import START_TIMEOUT_S, free_port, running_cluster
from tests.cluster.rank_cluster import ADDRESS, MODEL, RankHosts, Shape, check, running
from tests.cluster.test_same_tokens import check_answers, cluster_tokens, prompts


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 2)], ids=str)
def test_tokens_are_those_of_transformers(shape: Shape, tmp_path: Path) -> None:
    with running(tmp_path, colocated_0=shape) as cluster:
        check(cluster)


@pytest.mark.parametrize(
    ("source", "reader"), [((1, 2), (1, 1)), ((1, 1), (2, 1)), ((2, 1), (1, 2)), ((2, 2), (1, 2))], ids=str
)
def test_kv_moves_between_instances_of_one_and_of_two_hosts(source: Shape, reader: Shape, tmp_path: Path) -> None:
    with running(tmp_path, prefill_0=source, decode_0=reader) as cluster:
        check(cluster)
        (decode,) = (status for status in cluster.instances() if status.role is Role.DECODE)
        assert [link.transport for link in decode.links] == ["gloo"]
        assert decode.links[0].failures == 0
        assert decode.links[0].streamed_bytes > 0


def test_kv_of_both_stages_comes_while_a_prompt_is_computed(tmp_path: Path) -> None:
    """In six chunks; the first stage alone has half of the KV."""
    prompt = max(prompts(4000), key=len)[:1500]
    with running(tmp_path, prefill_0=(1, 2), decode_0=(1, 1)) as cluster:

        def most_was_streamed() -> bool:
            """On a busy machine the second stage may be late."""
            prompt[0] = 3 + prompt[0] % 3000  # nothing is cached
            before = streamed_and_all()
            check_answers(cluster, [prompt], asyncio.run(cluster_tokens(cluster, [prompt])))
            time.sleep(0.5)  # a few heartbeats
            streamed, transferred = (now - then for now, then in zip(streamed_and_all(), before, strict=True))
            return streamed > 0.6 * transferred

        def streamed_and_all() -> tuple[int, int]:
            links = cluster.status("decode-0").links
            return sum(link.streamed_bytes for link in links), sum(link.transfer_bytes for link in links)

        until(most_was_streamed, 60.0, "KV of the second stage is streamed")


def test_only_whoever_knows_the_token_joins(tmp_path: Path) -> None:
    """Others are refused and harm nobody; so is a host with other model files."""
    other = tmp_path / "other" / MODEL.name
    shutil.copytree(MODEL, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    port = free_port()
    ranks = {"listen": f"{ADDRESS}:{port}", "per_host": [1, 1]}
    with running(tmp_path, colocated_1=(1, 1)) as cluster, ExitStack() as stack:
        cluster.start_instance("colocated-0", (1, 2), ranks=ranks)
        cluster.kill("colocated-0 ranks")  # a host that comes too early, and goes

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex((ADDRESS, port)) == 0

        until(listens, START_TIMEOUT_S, "rank 0 listens")
        silent = stack.enter_context(socket.create_connection((ADDRESS, port)))
        silent.send(b"x")
        with socket.create_connection((ADDRESS, port)) as noisy:
            noisy.sendall(os.urandom(4096))
        for stranger, status in (("--set=cluster_token=wrong", 2), (f"--set=model={other}", 1)):
            cluster.start_ranks("colocated-0", stranger)
            process = cluster.processes.pop("colocated-0 ranks")
            assert process.wait(START_TIMEOUT_S) == status
        refused = cluster.log_path("colocated-0 ranks").read_text()
        assert "it has another cluster_token" in refused
        assert "rank 0 has given up the instance: the model files of rank 1 on" in refused
        with pytest.raises(ConnectionError):
            join(f"{ADDRESS}:{port}", "wrong", JoinRequest(Purpose.HOST))
        assert cluster.processes.pop("colocated-0").wait(20) == 1
        assert "the model files of rank 1 on" in cluster.log_path("colocated-0").read_text()


@pytest.mark.parametrize("order", ["ranks first", "rank 0 first"])
def test_they_start_in_any_order_and_end_together(order: str, tmp_path: Path) -> None:
    with running_cluster(MODEL, tmp_path, num_prefill=0, decode_transports=(), make=RankHosts) as cluster:
        cluster.start_instance("colocated-0", (1, 2))
        if order == "rank 0 first":
            cluster.kill("colocated-0 ranks")
            time.sleep(5.0)
            cluster.start_ranks("colocated-0")
        cluster.wait_ready(0, 0, 1)
        check(cluster, 4)
        cluster.processes["colocated-0"].send_signal(signal.SIGTERM)
        for name in ("colocated-0", "colocated-0 ranks"):
            assert cluster.processes.pop(name).wait(20) == 0

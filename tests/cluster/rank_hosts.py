"""Tests of `test_hosts.py`, run inside the network namespace of host a: instances with ranks on two hosts.

host a: router, rank 0 of each instance   <--veth pair-->   host b: the other ranks
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tandem.core.session import Role
from tandem.worker.ranks.joining import JoinRequest, Purpose, join
from tests.chaos.faults import until
from tests.cluster.harness import START_TIMEOUT_S, Cluster, free_port, running_cluster
from tests.cluster.namespaces import Hosts
from tests.cluster.test_same_tokens import check_answers, cluster_tokens, prompts

HOSTS = Hosts.of_environment()
ADDRESS = HOSTS.link_address("a", "b")
MODEL = Path(__file__).parents[2] / "models" / "tiny-python"
LOST_WITHIN_S = 2.0
CUT_WITHIN_S = 3.0  # the kernel gives a host that does not answer up after 2 s
MARGIN_S = 1.0
Shape = tuple[int, int]


class RankHosts(Cluster):
    """`NAME ranks` is the process of an instance's ranks on host b."""

    def start_instance(self, name: str, shape: Shape, block_size: int = 16, **settings: Any) -> None:
        """Of a role, which begins its name; of more than one rank on both hosts."""
        role = Role(name.partition("-")[0])
        tp, pp = shape
        sizes = {"tp": tp, "pp": pp, "threads": tp * pp, "block_size": block_size}
        engine = {"kv_memory": "32MiB", "dtype": "float32"} | sizes
        config: dict[str, Any] = {
            "name": name,
            "role": role.value,
            "listen": f"{ADDRESS}:0",
            "routers": [self.control_address],
            "heartbeat_s": 0.1,
            "instance": {"engine": engine, "max_batch_tokens": 256, "stream_kv_from": "256KiB"},
        }
        if tp * pp > 1:
            config["ranks"] = {"listen": f"{ADDRESS}:{free_port()}", "per_host": [tp * pp // 2, tp * pp // 2]}
        self.start(name, "tandem.worker", config | settings)
        if tp * pp > 1:
            self.start_ranks(name)

    def start_ranks(self, name: str, *arguments: str) -> None:
        with self.log_path(f"{name} ranks").open("ab") as log:
            self.processes[f"{name} ranks"] = subprocess.Popen(
                [
                    *HOSTS.inside("b"),
                    *(sys.executable, "-m", "tandem.cli.main", "ranks", str(self.folder / f"{name}.yaml"), *arguments),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )

    def ranks_on_b(self, name: str) -> list[psutil.Process]:
        return psutil.Process(self.processes[f"{name} ranks"].pid).children()


@contextmanager
def running(folder: Path, **shapes: Shape) -> Iterator[RankHosts]:
    """Instances of these names, with _ for -. Blocks have another size in each."""
    with running_cluster(MODEL, folder, num_prefill=0, decode_transports=(), make=RankHosts) as cluster:
        for name, block_size in zip(shapes, (16, 8, 32), strict=False):
            cluster.start_instance(name.replace("_", "-"), shapes[name], block_size)
        roles = [name.partition("_")[0] for name in shapes]
        cluster.wait_ready(*(roles.count(role) for role in ("prefill", "decode", "colocated")))
        yield cluster


def check(cluster: Cluster, num_prompts: int = 24) -> None:
    prompt_ids = [token_ids for token_ids in prompts(4000) if len(token_ids) < 700][:num_prompts]
    answers = asyncio.run(cluster_tokens(cluster, prompt_ids))
    check_answers(cluster, prompt_ids, answers)
    cluster.wait_idle(timeout_s=5.0)


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

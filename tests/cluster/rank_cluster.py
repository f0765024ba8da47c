"""Instances with ranks on two hosts, in the network namespaces of `test_hosts.py`.

host a: router, rank 0 of each instance   <--veth pair-->   host b: the other ranks
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tandem.core.session import Role
from tests.cluster.harness import Cluster, free_port, running_cluster
from tests.cluster.namespaces import Hosts
from tests.cluster.test_same_tokens import check_answers, cluster_tokens, prompts

HOSTS = Hosts.of_environment()
ADDRESS = HOSTS.link_address("a", "b")
MODEL = Path(__file__).parents[2] / "models" / "tiny-python"
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

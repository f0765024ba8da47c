"""A Ray cluster on two hosts, and `tandem serve --ray` and `tandem up --ray` there, for tests that run inside the
network namespace of host a.

    host a, 10.77.0.1: Ray's head, the command, the router   <--veth pair-->   host b, 10.77.0.2: a node of Ray

Host b has other weights in the folder `RayHosts.other` than host a, by a mount that only it sees.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tandem import AsyncClient
from tandem.core.clock import SystemClock
from tandem.core.errors import UnavailableError
from tandem.core.session import InstanceStatus, Role
from tandem.deploy.child_process import kill_all, processes_that_use
from tandem.deploy.fleet_query import fetch_fleet
from tandem.deploy.run_state import RunState, StateFolders
from tandem.deploy.trial import try_instances, ways_through
from tests.cluster.namespaces import Hosts
from tests.cluster.test_same_tokens import NUM_NEW_TOKENS

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-python"
HOSTS = Hosts.of_environment()
ADDRESS_A, ADDRESS_B = HOSTS.link_address("a", "b"), HOSTS.link_address("b", "a")
HEAD = f"{ADDRESS_A}:6379"
START_TIMEOUT_S = 240.0
PROMPTS = [[7 + i, 40 + i, 99, 12] * 8 for i in range(8)]
SMALL = [
    f"--set={role}.engine.{setting}"
    for role in ("prefill", "decode")
    for setting in ("kv_memory=64MiB", "threads=1", "dtype=float32")
]


class RayHosts:
    """The Ray cluster, with a token, and commands of one user on host a."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.state_b = folder / "state-b"  # of processes on host b
        self.other = folder / "other" / MODEL.name
        self.head: subprocess.Popen[bytes] | None = None
        self.node_b: subprocess.Popen[bytes] | None = None
        self._num_started = 0  # nodes, also those that are gone
        (folder / "token").write_text("0" * 64)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TANDEM_STATE_DIR": str(self.state),
            "TMPDIR": str(folder),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "120",
            "RAY_memory_monitor_refresh_ms": "0",
        }

    def start_ray(self, address: str, cpus: int, *enter: str) -> "subprocess.Popen[bytes]":
        where = (
            [f"--address={HEAD}", '--resources={"tandem-group": 2}']
            if enter
            else ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={self.folder / 'r'}"]
        )
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", f"--num-cpus={cpus}"]
        command += [f"--node-ip-address={address}", "--object-store-memory=80000000", "--num-gpus=0", *where]
        self._num_started += 1
        with (self.folder / f"ray-{address}.log").open("ab") as log:
            own = self.environment | ({"TANDEM_STATE_DIR": str(self.state_b)} if enter else {})
            return subprocess.Popen([*enter, *command], env=own, stdout=log, stderr=log)

    def start_b(self) -> None:
        """Host b, with other weights in one folder."""
        changed = self.folder / "changed"
        mount = f'mount --bind {changed} {self.other} && exec "$@"'
        self.node_b = self.start_ray(ADDRESS_B, 2, *HOSTS.inside("b"), "sh", "-c", mount, "sh")
        self.wait_nodes()

    def kill_b(self) -> None:
        """As a loss of power: nobody is told."""
        HOSTS.cut("a", "b")
        command = ["ip", "netns", "pids", HOSTS.namespaces["b"]]
        pids = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for pid in pids.split():
            os.kill(int(pid), signal.SIGKILL)
        assert self.node_b is not None
        self.node_b.wait(10)
        HOSTS.mend("a", "b")

    def wait_nodes(self) -> None:
        """Until Ray has heard of all that were started. It goes on to list those that are gone."""
        ask = f"import ray; ray.init('{HEAD}', log_to_driver=False); print(len(ray.nodes()))"
        until_s = time.monotonic() + START_TIMEOUT_S
        while True:
            asked = subprocess.run(
                [sys.executable, "-c", ask], env=self.environment, capture_output=True, text=True, check=False
            )
            if asked.stdout.split()[-1:] == [str(self._num_started)]:
                return
            logs = [log.read_text()[-2000:] for log in self.folder.glob("ray-*.log")]
            assert time.monotonic() < until_s, f"{asked.stdout}{asked.stderr}{logs}"
            ended = [node for node in (self.head, self.node_b) if node is not None and node.poll() is not None]
            assert not ended, logs
            time.sleep(1.0)

    def tandem(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "tandem.cli.main", *arguments]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
        )

    def followers(self) -> dict[str, int]:
        """How many ranks beside rank 0 run on each host."""
        return {
            address: sum("tandem.worker.ranks.follower" in _command(each) for each in processes_that_use(folder))
            for address, folder in ((ADDRESS_A, self.state), (ADDRESS_B, self.state_b))
        }

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.tandem("status", "--json").stdout)
        return found

    def run_state(self) -> RunState:
        folders = StateFolders.of_environment({"TANDEM_STATE_DIR": str(self.state)})
        (run,) = folders.running()
        return run


class Served:
    """`tandem serve --ray` or, after `tandem up --ray`, the cluster of that name."""

    def __init__(self, hosts: RayHosts) -> None:
        self.hosts = hosts

    def instances(self) -> tuple[InstanceStatus, ...]:
        """Those that the router knows; none while it starts."""
        run = self.hosts.run_state()
        try:
            return asyncio.run(fetch_fleet(run.control, run.cluster_token, run.tls)).instances
        except UnavailableError:
            return ()

    def wait_instances(self, wanted: dict[str, list[str]]) -> None:
        """Until the instances of each host are these: the beginnings of their ids."""
        until_s = time.monotonic() + START_TIMEOUT_S
        while (found := self.by_host()) != wanted:
            assert time.monotonic() < until_s, f"{found}\n{self.hosts.status()}"
            time.sleep(0.5)

    def by_host(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for status in self.instances():
            name = "-".join(status.instance_id.split("-")[:2])
            found.setdefault(status.address.rpartition(":")[0], []).append(name)
        return {host: sorted(names) for host, names in found.items()}

    def until_b_decodes(self) -> None:
        until_s = time.monotonic() + 60
        while not any(
            status.role is Role.DECODE and status.address.startswith(ADDRESS_B) and status.running_requests
            for status in self.instances()
        ):
            assert time.monotonic() < until_s, self.hosts.status()

    def try_all_pairs(self) -> None:
        run = self.hosts.run_state()
        for pair in ways_through(self.instances()):
            asyncio.run(try_instances(pair, run.model, run.cluster_token, 60.0, SystemClock()))

    def transports(self) -> set[tuple[bool, str]]:
        """Of links that have been used, between instances that are there: whether both ends are on one host, and how KV
        moves."""
        time.sleep(1.0)  # a few heartbeats
        instances = self.instances()
        host = {status.instance_id: status.address.rpartition(":")[0] for status in instances}
        return {
            (host[link.peer_id] == host[status.instance_id], link.transport)
            for status in instances
            if status.role is Role.DECODE
            for link in status.links
            if link.peer_id in host
        }

    async def greedy_answers(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        async with AsyncClient(self.hosts.run_state().grpc) as client:
            tasks = [
                client.generate(
                    token_ids=prompt, max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True, timeout_s=120
                )
                for prompt in prompt_ids
            ]
            return [list(completion.token_ids) for completion in await asyncio.gather(*tasks)]

    async def answers(self, max_tokens: int) -> list[tuple[int, ...]]:
        async with AsyncClient(self.hosts.run_state().grpc) as client:
            tasks = [
                client.generate(
                    token_ids=prompt, max_tokens=max_tokens, temperature=0.8, seed=i, ignore_eos=True, timeout_s=120
                )
                for i, prompt in enumerate(PROMPTS)
            ]
            return [tuple(completion.token_ids) for completion in await asyncio.gather(*tasks)]


@contextmanager
def running_ray() -> Iterator[RayHosts]:
    """With both nodes. They and all in them are gone afterwards."""
    folder = Path("/tmp") / f"tr{os.getpid()}"  # the paths of Ray's sockets are short
    folder.mkdir(mode=0o700)
    hosts = RayHosts(folder)
    shutil.copytree(MODEL, hosts.other)
    shutil.copytree(MODEL, folder / "changed")
    weights = bytearray((MODEL / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "changed" / "model.safetensors").write_bytes(weights)
    hosts.head = hosts.start_ray(ADDRESS_A, 4)
    try:
        hosts.wait_nodes()
        hosts.start_b()
        yield hosts
    finally:
        kill_all(processes_that_use(folder))
        for node in filter(None, (hosts.head, hosts.node_b)):
            node.kill()
            node.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def serve(hosts: RayHosts, *arguments: str) -> "tuple[subprocess.Popen[str], Path]":
    """`tandem serve --ray` on host a, and the file of its output."""
    output = hosts.folder / "output"
    ports = [f"--set=router.{name}=127.0.0.1:0" for name in ("http", "grpc", "control")]
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tandem.cli.main", "serve", *arguments, "--ray", HEAD, *ports],
            env=hosts.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return process, output


def wait_for(process: "subprocess.Popen[str]", output: Path, pattern: str) -> None:
    until_s = time.monotonic() + START_TIMEOUT_S
    while not re.search(pattern, output.read_text(), re.MULTILINE):
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < until_s, f"{pattern} was never printed:\n{output.read_text()}"
        time.sleep(0.1)


def no_workers_left(folder: Path) -> bool:
    """On either host, a moment later."""
    until_s = time.monotonic() + 30
    while any("tandem.deploy.hosted_process" in _command(process) for process in processes_that_use(folder)):
        if time.monotonic() > until_s:
            return False
        time.sleep(0.2)
    return True


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []

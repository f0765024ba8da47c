"""`tandem serve --ray` and `tandem up --ray` on two hosts, run inside the network namespace of host a.

    host a, 10.77.0.1: Ray's head, the command, the router   <--veth pair-->   host b, 10.77.0.2: a node of Ray

Host b has other weights in the folder `OTHER` than host a, by a mount that only it sees.
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
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tandem import AsyncClient
from tandem.core.clock import SystemClock
from tandem.core.errors import UnavailableError
from tandem.core.session import InstanceStatus, Role
from tandem.deploy.child_process import kill_all, processes_that_use
from tandem.deploy.fleet_query import fetch_fleet
from tandem.deploy.run_state import RunState, StateFolders
from tandem.deploy.trial import try_instances, ways_through
from tests.cluster.namespaces import Hosts
from tests.cluster.test_same_tokens import NUM_NEW_TOKENS, prompts, reference_tokens

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
        with (self.folder / f"ray-{address}.log").open("ab") as log:
            own = self.environment | ({"TANDEM_STATE_DIR": str(self.state_b)} if enter else {})
            return subprocess.Popen([*enter, *command], env=own, stdout=log, stderr=log)

    def start_b(self) -> None:
        """Host b, with other weights in one folder."""
        changed = self.folder / "changed"
        mount = f'mount --bind {changed} {self.other} && exec "$@"'
        self.node_b = self.start_ray(ADDRESS_B, 2, *HOSTS.inside("b"), "sh", "-c", mount, "sh")
        self.wait_nodes(2)

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

    def wait_nodes(self, number: int) -> None:
        """Ray's own command tells."""
        ask = f"import ray; ray.init('{HEAD}', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
        until_s = time.monotonic() + START_TIMEOUT_S
        while True:
            asked = subprocess.run(
                [sys.executable, "-c", ask], env=self.environment, capture_output=True, text=True, check=False
            )
            if asked.stdout.strip().endswith(str(number)):
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
        """Of links that have been used: whether both ends are on one host, and how KV moves."""
        time.sleep(1.0)  # a few heartbeats
        instances = self.instances()
        host = {status.instance_id: status.address.rpartition(":")[0] for status in instances}
        return {
            (host[link.peer_id] == host[status.instance_id], link.transport)
            for status in instances
            if status.role is Role.DECODE
            for link in status.links
        }

    async def answers(self, max_tokens: int) -> list[tuple[int, ...]]:
        async with AsyncClient(self.hosts.run_state().grpc) as client:
            tasks = [
                client.generate(
                    token_ids=prompt, max_tokens=max_tokens, temperature=0.8, seed=i, ignore_eos=True, timeout_s=120
                )
                for i, prompt in enumerate(PROMPTS)
            ]
            return [tuple(completion.token_ids) for completion in await asyncio.gather(*tasks)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
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
        hosts.wait_nodes(1)
        hosts.start_b()
        yield hosts
    finally:
        kill_all(processes_that_use(folder))
        for node in filter(None, (hosts.head, hosts.node_b)):
            node.kill()
            node.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def plan_file(folder: Path) -> Path:
    """Two nodes with a pair each."""
    groups = [
        {
            "role": role,
            "instances": 2,
            "device": "CPU",
            "kv_tokens": 20_000,
            "devices": [[f"x:{index}"], [f"y:{index}"]],
        }
        for index, role in enumerate(("prefill", "decode"))
    ]
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "model": str(MODEL), "verdict": "disaggregate", "groups": groups}))
    return path


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


def test_a_plan_of_two_nodes_survives_the_loss_of_one(hosts: RayHosts) -> None:
    process, output = serve(hosts, str(plan_file(hosts.folder)), *SMALL)
    served = Served(hosts)
    try:
        wait_for(process, output, r"^Ctrl-C ends it\.$")
        before = served.by_host()
        assert sorted(map(tuple, before.values())) == [("decode-0", "prefill-0"), ("decode-1", "prefill-1")]
        assert set(before) == {ADDRESS_A, ADDRESS_B}
        served.try_all_pairs()
        assert served.transports() == {(True, "shared_memory"), (False, "gloo")}

        (on_b,) = (instances[0] for host, instances in before.items() if host == ADDRESS_B)
        assert list(hosts.state_b.rglob(f"{on_b}.log"))
        assert not list(hosts.state.rglob(f"{on_b}.log"))
        logs = hosts.tandem("logs", on_b, "-n", "1000")
        assert "the hash of the files" in logs.stdout, logs.stdout + logs.stderr

        undisturbed = asyncio.run(served.answers(600))

        async def disturbed() -> list[tuple[int, ...]]:
            running = asyncio.create_task(served.answers(600))
            await asyncio.to_thread(served.until_b_decodes)
            await asyncio.to_thread(hosts.kill_b)
            assert not running.done(), "the host was lost too late to matter"
            return await running

        assert asyncio.run(disturbed()) == undisturbed
        wait_for(process, output, rf"its node {ADDRESS_B} has (died|not answered)")
        served.wait_instances({ADDRESS_A: ["decode-0", "decode-1", "prefill-0", "prefill-1"]})
        served.try_all_pairs()

        hosts.start_b()
        scaled = hosts.tandem("scale", "--decode", "3")
        assert scaled.returncode == 0, scaled.stdout + scaled.stderr
        assert served.by_host()[ADDRESS_B] == ["decode-2"], "the host that came back has the least load"
        served.try_all_pairs()

        applied = hosts.tandem("apply", str(plan_file(hosts.folder)), *SMALL)
        assert applied.returncode == 0, applied.stdout + applied.stderr
        for name in before[ADDRESS_B]:
            assert f"{name} goes back to the node of the plan" in applied.stdout
        served.wait_instances(before)
        served.try_all_pairs()
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode == 0, output.read_text()
    assert no_workers_left(hosts.folder)


def test_other_model_files_on_a_host_are_refused(hosts: RayHosts) -> None:
    served = hosts.tandem(
        "serve",
        "--ray",
        HEAD,
        f"--set=model={hosts.other}",
        *SMALL,
        "--set=prefill.instances=2",
        "--set=router.http=127.0.0.1:0",
    )
    assert served.returncode == 1, served.stdout + served.stderr
    text = rf"on {ADDRESS_B}: the model files in {hosts.other} are not those of the cluster: their hash is \w+, and "
    assert re.search(text, served.stderr), served.stdout + served.stderr
    assert no_workers_left(hosts.folder)


def test_nothing_outlives_a_command_that_is_killed(hosts: RayHosts) -> None:
    file = hosts.folder / "colocated.yaml"
    section = {"instances": 2, "engine": {"kv_memory": "64MiB", "threads": 1}}
    file.write_text(yaml.safe_dump({"model": str(MODEL), "colocated": section}))
    process, output = serve(hosts, str(file))
    wait_for(process, output, r"^Ctrl-C ends it\.$")
    assert set(Served(hosts).by_host()) == {ADDRESS_A, ADDRESS_B}
    process.kill()
    process.wait(10)
    assert no_workers_left(hosts.folder)


def test_a_cluster_outlives_the_command_and_its_controller(hosts: RayHosts) -> None:
    ports = [f"--set=router.{name}=127.0.0.1:0" for name in ("http", "grpc", "control")]
    up = hosts.tandem("up", "--ray", HEAD, f"--set=model={MODEL}", *SMALL, *ports)
    assert up.returncode == 0, up.stdout + up.stderr
    served = Served(hosts)
    try:
        before = {status.instance_id for status in served.instances()}
        (controller,) = (each for each in psutil.process_iter() if each.name().startswith("ray::RayContro"))
        controller.kill()
        until_s = time.monotonic() + START_TIMEOUT_S
        while (status := hosts.tandem("status")).returncode:
            assert time.monotonic() < until_s, status.stderr
        scaled = hosts.tandem("scale", "--decode", "2")
        assert scaled.returncode == 0, scaled.stdout + scaled.stderr
        after = {status.instance_id for status in served.instances()}
        assert before < after, "the next controller has taken them back"
        served.try_all_pairs()

        again = hosts.tandem("up", "--ray", HEAD)
        assert again.returncode == 2
        assert "runs already (on the Ray cluster" in again.stderr
        hosts.environment["TANDEM_STATE_DIR"] = str(hosts.folder / "elsewhere")
        found = hosts.tandem("up", "--ray", HEAD)
        assert found.returncode == 0, found.stderr
        assert "found tiny-python" in found.stdout
    finally:
        hosts.environment["TANDEM_STATE_DIR"] = str(hosts.state)
        down = hosts.tandem("down")
    assert down.returncode == 0, down.stdout + down.stderr
    assert no_workers_left(hosts.folder)
    assert hosts.tandem("status").returncode == 1


def test_the_form_of_kubernetes(hosts: RayHosts) -> None:
    """As the chart's RayCluster: the controller starts no router, instances go to the node that has the resource of
    their group, and a router that is started elsewhere announces itself."""
    engine = {"kv_memory": "64MiB", "threads": 1, "dtype": "float32"}
    kind = {"engine": engine, "ray_resources": {"tandem-group": 1}}
    common = {"model": str(MODEL), "cluster_token": f"file:{hosts.folder / 'token'}"}
    settings = {"start_router": False, "controller": "127.0.0.1:8003", "prefill": kind, "decode": kind}
    section = {"http": "127.0.0.1:8000", "grpc": "127.0.0.1:8001", "control": "0.0.0.0:8002"}
    router = {"router": section, "controller": f"{ADDRESS_A}:8003", "advertise": ADDRESS_A}
    files = {}
    for name, content in (("settings", settings), ("router", router)):
        files[name] = hosts.folder / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(common | content))
    up = hosts.tandem("up", str(files["settings"]), "--ray", HEAD, "--no-wait")
    assert up.returncode == 0, up.stdout + up.stderr
    command = [sys.executable, "-m", "tandem.cli.main", "router", str(files["router"]), "--grace", "1"]
    with (hosts.folder / "router.log").open("wb") as log:
        process = subprocess.Popen(command, env=hosts.environment, stdout=log, stderr=log)
    served = Served(hosts)
    try:
        served.wait_instances({ADDRESS_B: ["decode-0", "prefill-0"]})
        served.try_all_pairs()
        assert [each["name"] for each in hosts.status()["cluster"]["processes"]] == ["prefill-0", "decode-0"]
    finally:
        process.terminate()
        process.wait(30)
        down = hosts.tandem("down")
    assert down.returncode == 0, down.stdout + down.stderr
    assert no_workers_left(hosts.folder)


def test_an_instance_that_no_node_has_room_for_is_on_two(hosts: RayHosts) -> None:
    """Three ranks of two cores each: two of them fit on host a, and one on host b."""
    file = hosts.folder / "large.yaml"
    engine = {"kv_memory": "64MiB", "dtype": "float32", "threads": 6, "pp": 3}
    file.write_text(yaml.safe_dump({"model": str(MODEL), "colocated": {"engine": engine}}))
    process, output = serve(hosts, str(file))
    served = Served(hosts)
    prompt_ids = [token_ids for token_ids in prompts(4000) if len(token_ids) < 300][:8]
    wanted = [reference_tokens(MODEL, tuple(token_ids)) for token_ids in prompt_ids]

    async def answers() -> list[list[int]]:
        async with AsyncClient(hosts.run_state().grpc) as client:
            tasks = [
                client.generate(
                    token_ids=prompt, max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True, timeout_s=120
                )
                for prompt in prompt_ids
            ]
            return [list(completion.token_ids) for completion in await asyncio.gather(*tasks)]

    def ranks_of(folder: Path) -> int:
        commands = [_command(each) for each in processes_that_use(folder)]
        return sum("tandem.worker.ranks.follower" in command for command in commands)

    try:
        wait_for(process, output, r"^Ctrl-C ends it\.$")
        (host,) = served.by_host()
        assert host == ADDRESS_A, "it is the node with most room"
        assert (ranks_of(hosts.state), ranks_of(hosts.state_b)) == (1, 1)
        assert asyncio.run(answers()) == wanted
        (before,) = (status.instance_id for status in served.instances())
        hosts.kill_b()
        wait_for(process, output, r"colocated-0: .*10\.77\.0\.2 of the instance has ended")
        hosts.start_b()
        served.wait_instances({ADDRESS_A: ["colocated-0"]})
        assert {status.instance_id for status in served.instances()} != {before}
        assert asyncio.run(answers()) == wanted
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode == 0, output.read_text()
    assert no_workers_left(hosts.folder)


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

"""`tandem up` as a user meets it: a cluster that outlives the terminal, and its own controller."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tandem.deploy.process_identity import ProcessIdentity
from tandem.models.random_checkpoint import CheckpointShape, write_random_checkpoint
from tests.cli.served import FREE_PORTS, ROOT, run_python, wait_for
from tests.cluster.harness import free_port

pytestmark = pytest.mark.timeout(300)
_SMALL = [f"--set={role}.engine.kv_memory=8MiB" for role in ("prefill", "decode")]


class Terminal:
    """Runs commands for one user, whose files are in `folder`."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.state = folder / "state"
        self.environment = {**os.environ, "TANDEM_STATE_DIR": str(self.state), "OMP_NUM_THREADS": "1"}
        self.model = model
        self._model = f"--set=model={model}"

    def tandem(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return run_python(["-m", "tandem.cli.main", *arguments], self.environment, stdin)

    def up(self, *settings: str) -> subprocess.CompletedProcess[str]:
        return self.tandem("up", self._model, *_SMALL, *FREE_PORTS, *settings)

    def apply(self, *settings: str) -> subprocess.CompletedProcess[str]:
        return self.tandem("apply", self._model, *_SMALL, *settings)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.tandem("status", "--json").stdout)
        return found

    def pids(self) -> dict[str, int]:
        return {process["name"]: process["pid"] for process in self.status()["cluster"]["processes"]}

    def kill_controller(self) -> None:
        pid = self.status()["run"]["pid"]
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)

    @property
    def cluster(self) -> Path:
        return self.state / "clusters" / "default"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("models") / "little", CheckpointShape())


@pytest.fixture
def terminal(model: Path) -> Iterator[Terminal]:
    """Nothing is left at the end, whatever the test does: processes end when the folder of their cluster is gone."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        terminal = Terminal(Path(folder), model)
        yield terminal
        terminal.tandem("down", "--now")


def test_a_cluster_outlives_terminal_and_controller(terminal: Terminal) -> None:
    """A stream begins under one controller and ends under the next; no process is started anew."""
    up = terminal.up()
    assert up.returncode == 0, up.stdout + up.stderr
    http = re.search(r"HTTP  (\S+)/v1", up.stdout)
    assert http is not None
    before = terminal.pids()
    assert set(before) == {"router-0", "prefill-0", "decode-0"}
    body = {"model": "little", "prompt": "x", "max_tokens": 200, "stream": True, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{http[1]}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.readline().startswith(b"data: ")
        terminal.kill_controller()
        assert "start it again with: tandem up" in terminal.tandem("status").stderr
        again = terminal.tandem("up")
        assert again.returncode == 0, again.stdout + again.stderr
        assert response.read().endswith(b"data: [DONE]\n\n")
    assert terminal.pids() == before
    down = terminal.tandem("down")
    assert down.returncode == 0, down.stderr
    assert not any(ProcessIdentity.of(pid) for pid in before.values())
    assert {path.name for path in terminal.cluster.iterdir()} == {"lock", "logs"}


@pytest.mark.slow
def test_a_changed_cluster(terminal: Terminal) -> None:
    assert terminal.up().returncode == 0
    before = terminal.pids()
    assert terminal.up().returncode == 2, "it runs already"
    assert terminal.tandem("stop").returncode == 2, "it would end the controller only"
    more = terminal.apply("--set=prefill.instances=2")
    assert more.stdout.splitlines()[-1] == "started prefill-1", more.stderr
    other = terminal.apply("--set=prefill.instances=2", "--set=decode.max_queue=7")
    assert other.stdout.splitlines()[-1] == "replaced decode-0", other.stderr
    after = terminal.pids()
    assert (after["router-0"], after["prefill-0"]) == (before["router-0"], before["prefill-0"])
    assert after["decode-0"] != before["decode-0"]
    command = [sys.executable, "-m", "tandem.cli.main", "logs", "prefill-1", "--lines", "0", "--follow"]
    with subprocess.Popen(command, env=terminal.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as following:
        time.sleep(5.0)  # it reads the end of the log first
        assert terminal.tandem("role", "prefill-1", "decode").returncode == 0
        assert following.stdout is not None
        assert "role prefill -> decode" in following.stdout.readline()
        following.send_signal(signal.SIGINT)
    assert following.returncode == 130
    os.kill(after["prefill-1"], signal.SIGKILL)
    until_s = time.monotonic() + 60
    while True:  # it comes back in its new role
        processes = {process["name"]: process for process in terminal.status()["cluster"]["processes"]}
        if processes["prefill-1"]["state"] == "up" and processes["prefill-1"]["pid"] != after["prefill-1"]:
            break
        assert time.monotonic() < until_s
        time.sleep(0.2)
    time.sleep(1.0)  # a few heartbeats
    roles = sorted(instance["role"] for instance in terminal.status()["fleet"]["instances"])
    assert roles == ["decode", "decode", "prefill"]
    wrong = terminal.apply("--set=prefill.instances=2", "--set=prefill.engine.kv_memory=512")
    assert wrong.returncode == 2
    fewer = terminal.apply()
    assert fewer.stdout.splitlines()[-1] == "stopped prefill-1; replaced decode-0", fewer.stderr
    drained = terminal.tandem("drain", "prefill-0")
    assert drained.stdout.splitlines()[-1] == "stopped prefill-0", drained.stderr
    assert re.search(r"^prefill-0 +prefill +drained", terminal.tandem("status").stdout, re.MULTILINE)
    assert "draining" in terminal.tandem("logs", "controller").stdout
    assert terminal.tandem("drain", "prefill-0", "--undo").returncode == 0
    moved = terminal.apply(f"--set=router.control=127.0.0.1:{free_port()}")
    assert moved.stdout.splitlines()[-1] == "replaced router-0", moved.stderr
    assert len(terminal.status()["fleet"]["instances"]) == 2, "they have found the router where it is now"
    assert terminal.tandem("chat", "--complete", "--max-tokens", "4", stdin="still here\n").returncode == 0


@pytest.mark.slow
def test_apply_changes_roles_under_load_and_no_request_fails(terminal: Terminal) -> None:
    """An instance that is wanted in another role goes on in the same process, there and back again."""
    assert terminal.up("--set=prefill.instances=2").returncode == 0
    before, http = terminal.pids(), terminal.status()["run"]["http"]
    stop = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(_complete_until, stop, http) for _ in range(4)]
        try:
            for changes, words, roles in (
                (("--set=decode.instances=2",), "prefill-1 goes on as decode-1", {"prefill": 1, "decode": 2}),
                (("--set=prefill.instances=2",), "applying settings", {"prefill": 2, "decode": 1}),
                (("--set=decode.instances=2",), "prefill-1 goes on as decode-1", {"prefill": 1, "decode": 2}),
            ):
                applied = terminal.apply(*changes)
                assert applied.returncode == 0, applied.stderr
                assert applied.stdout.splitlines()[-1] == "no process had to start or to stop"
                assert words in applied.stdout
                assert terminal.pids() == before
                time.sleep(2.0)  # requests in the new roles
                seen = Counter(instance["role"] for instance in terminal.status()["fleet"]["instances"])
                assert seen == roles
        finally:
            stop.set()
        answers = [client.result(60) for client in clients]
    assert min(answers) > 5
    fleet = terminal.status()["fleet"]["instances"]
    assert {instance["blocks"]["leaked"] for instance in fleet} == {0}


def _complete_until(stop: threading.Event, http: str) -> int:
    """One stream after the other, each to its end; how many."""
    body = {"model": "little", "prompt": "x" * 40, "max_tokens": 30, "stream": True, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    number = 0
    while not stop.is_set():
        request = urllib.request.Request(f"http://{http}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            text = response.read()
        assert text.endswith(b"data: [DONE]\n\n"), text[-300:]
        assert text.count(b"data: ") > 2
        number += 1
    return number


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--now"]])
def test_down_without_a_controller(terminal: Terminal, options: list[str]) -> None:
    assert terminal.up().returncode == 0
    pids = terminal.pids()
    terminal.kill_controller()
    os.kill(pids["decode-0"], signal.SIGSTOP) if options else None
    down = terminal.tandem("down", *options)
    assert down.returncode == 0, down.stderr
    assert not any(ProcessIdentity.of(pid) for pid in pids.values())
    assert terminal.tandem("down").returncode == 1


@pytest.mark.slow
def test_a_cluster_that_cannot_start_leaves_nothing(terminal: Terminal) -> None:
    failed = terminal.up("--set=decode.engine.max_model_len=1000000")
    assert failed.returncode != 0
    assert not (terminal.cluster / "desired.json").exists(), failed.stdout + failed.stderr
    assert terminal.tandem("status").returncode == 1


@pytest.mark.slow
def test_a_process_that_died_without_a_controller_is_started_again(terminal: Terminal) -> None:
    assert terminal.up().returncode == 0
    before = terminal.pids()
    os.kill(terminal.status()["run"]["pid"], signal.SIGTERM)
    until_s = time.monotonic() + 30
    while terminal.tandem("status").returncode == 0:
        assert time.monotonic() < until_s
    os.kill(before["decode-0"], signal.SIGKILL)
    assert terminal.tandem("up").returncode == 0
    after = terminal.pids()
    assert {name for name in before if before[name] != after[name]} == {"decode-0"}


def starting(terminal: Terminal, output: Path, line: str) -> subprocess.Popen[str]:
    """`tandem up`, once it has said that line."""
    arguments = ["up", f"--set=model={terminal.model}", *_SMALL, *FREE_PORTS]
    with output.open("w") as file:
        up = subprocess.Popen(
            [sys.executable, "-m", "tandem.cli.main", *arguments],
            env=terminal.environment,
            cwd=ROOT,
            stdout=file,
            stderr=file,
            text=True,
        )
    wait_for(up, output, line)
    return up


@pytest.mark.slow
def test_a_controller_that_dies_in_the_start_is_told(terminal: Terminal, tmp_path: Path) -> None:
    output = tmp_path / "output"
    up = starting(terminal, output, r"prefill-0 loading")
    os.kill(json.loads((terminal.cluster / "run.json").read_text())["pid"], signal.SIGKILL)
    assert up.wait(60) == 1
    assert "the controller has ended before all was ready; `tandem up` starts another one" in output.read_text()
    again = terminal.tandem("up")
    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line", [r"^starting little", r"prefill-0 loading"])
def test_ctrl_c_ends_the_command_and_not_the_cluster(terminal: Terminal, tmp_path: Path, line: str) -> None:
    output = tmp_path / "output"
    up = starting(terminal, output, line)
    up.send_signal(signal.SIGINT)
    assert up.wait(60) == 130
    assert "interrupted; the cluster goes on with what it does" in output.read_text()
    until_s = time.monotonic() + 120
    while terminal.tandem("chat", "--complete", "--max-tokens", "4", stdin="here\n").returncode != 0:
        assert time.monotonic() < until_s, terminal.tandem("logs", "controller").stdout
        time.sleep(0.5)
    assert terminal.tandem("down").returncode == 0


@pytest.mark.slow
def test_upgrade_and_roll_back(terminal: Terminal, model: Path, tmp_path: Path) -> None:
    """The steps of docs/operations.md. What a newer version has written is here after the roll-back, and is read."""
    plans = {name: tmp_path / f"{name}.yaml" for name in ("old", "new")}
    for name, path in plans.items():
        instances = {"old": 1, "new": 2}[name]
        group = f"{{role: colocated, instances: {instances}, device: cpu, kv_tokens: 1024}}"
        path.write_text(f"model: {model}\nverdict: colocate\nsummary: {name}\ngroups: [{group}]\n")
    up = terminal.tandem("up", str(plans["old"]), *FREE_PORTS)
    assert up.returncode == 0, up.stdout + up.stderr
    before = terminal.pids()
    os.kill(terminal.status()["run"]["pid"], signal.SIGTERM)
    for file in (terminal.cluster / "desired.json", *(terminal.cluster / "processes").glob("*.json")):
        content = json.loads(file.read_text())
        content["config"]["setting_of_a_newer_version"] = 1
        file.write_text(json.dumps(content))
    until_s = time.monotonic() + 60
    while terminal.tandem("status").returncode == 0:
        assert time.monotonic() < until_s
    again = terminal.tandem("up")
    assert again.returncode == 0, again.stdout + again.stderr
    assert terminal.pids() == before, "all were taken back"
    assert "left out: setting_of_a_newer_version" in terminal.tandem("logs", "controller").stdout
    for name in sorted(before):  # the instance first
        assert terminal.tandem("drain", name).returncode == 0
        assert terminal.tandem("drain", name, "--undo").returncode == 0
    assert not set(before.values()) & set(terminal.pids().values())
    http = terminal.status()["run"]["http"]
    for name in ("new", "old"):
        assert terminal.tandem("apply", str(plans[name])).returncode == 0
        until_s = time.monotonic() + 60
        while (plan := _shown_plan(http)) != name:
            assert time.monotonic() < until_s, plan
            time.sleep(0.5)


def _shown_plan(http: str) -> str | None:
    with urllib.request.urlopen(f"http://{http}/ui/state", timeout=10) as response:
        plan = json.load(response)["plan"]
    return None if plan is None else str(plan["summary"])


@pytest.mark.slow
def test_a_router_that_comes_later_gets_the_instances(terminal: Terminal, model: Path) -> None:
    """It is started by hand, and knows the controller only. When it has gone, it is forgotten."""
    assert terminal.up().returncode == 0
    run = json.loads((terminal.cluster / "run.json").read_text())
    section = dict.fromkeys(("http", "grpc", "control"), "127.0.0.1:0")
    config = {"model": str(model), "router": section, "controller": run["controller"]}
    file = terminal.state / "router.yaml"
    file.write_text(json.dumps(config | {"cluster_token": run["cluster_token"]}))  # JSON is YAML
    command = [sys.executable, "-m", "tandem.cli.main", "router", str(file)]
    with subprocess.Popen(command, env=terminal.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as router:
        assert router.stdout is not None
        http = router.stdout.readline().split()[-1]
        until_s = time.monotonic() + 60
        while not _is_ready(http):
            assert time.monotonic() < until_s
            time.sleep(0.1)
        assert len(terminal.status()["cluster"]["routers"]) == 2
        router.terminate()
        assert router.wait(30) == 0
    until_s = time.monotonic() + 60
    while len(terminal.status()["cluster"]["routers"]) == 2:
        assert time.monotonic() < until_s


def _is_ready(http: str) -> bool:
    try:
        with urllib.request.urlopen(f"{http}/readyz", timeout=10) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError:
        return False

"""`tandem serve` as a user meets it: a real Ray, a real (random) model, every example, and a clean end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import tandem.cli.welcome
from tandem.core.config import ServeConfig
from tandem.models.random_checkpoint import CheckpointShape, write_random_checkpoint
from tandem.wire.fleet import FleetDescription
from tests.cli.served import FREE_PORTS, ROOT, Served, family_of, run_python, serving, start, wait_ended, wait_for

pytestmark = [pytest.mark.timeout(300), pytest.mark.unmeasured]
_SMALL = [f"--set={role}.engine.kv_memory=8MiB" for role in ("prefill", "decode")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("models") / "little", CheckpointShape())


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Short, as the paths of Ray's sockets must be, and empty at the end but for logs and output."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def served(model: Path, folder: Path) -> Iterator[Served]:
    with serving(folder, f"--set=model={model}", *_SMALL) as served:
        yield served


def test_the_printed_commands_work(served: Served) -> None:
    text = served.output.read_text()
    assert re.search(r"^ready in \d+\.\d s: 1 prefill, 1 decode$", text, re.MULTILINE)
    curl = re.search(r"^  (curl .*)$", text, re.MULTILINE)
    assert curl is not None
    answer = subprocess.run(["bash", "-c", curl[1]], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(answer.stdout)["usage"]["completion_tokens"] > 0
    python = re.search(r'^  python -c "(.*)"$', text, re.MULTILINE)
    assert python is not None
    assert run_python(["-c", python[1]], served.environment).returncode == 0


def test_every_example_runs(served: Served) -> None:
    stream = run_python(["examples/client_stream.py", served.grpc], served.environment)
    assert stream.returncode == 0, stream.stderr
    assert re.search(r"#   total +[0-9.]+ ms", stream.stdout)
    openai = run_python(["examples/openai_client.py", f"http://{served.http}/v1"], served.environment)
    assert openai.returncode == 0, openai.stderr
    curl = subprocess.run(
        ["bash", "examples/curl.sh", f"http://{served.http}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert curl.returncode == 0, curl.stderr
    assert "data: [DONE]" in curl.stdout


def test_chat_through_a_pipe(served: Served) -> None:
    asked = ["chat", "--complete", "--max-tokens", "4", "--temperature", "0"]
    chat = served.tandem(*asked, stdin="first line\nsecond line\n")
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.count("\n") >= 2
    elsewhere = served.tandem(*asked, "--address", "127.0.0.1:1", stdin="hello\n")
    assert elsewhere.returncode == 1
    assert "cannot be reached" in elsewhere.stderr


def test_status_and_doctor(served: Served, model: Path) -> None:
    served.tandem("chat", "--complete", "--max-tokens", "4", stdin="a transfer happens\n")
    time.sleep(1.2)  # two heartbeats
    status = json.loads(served.tandem("status", "--json").stdout)
    instances = {instance["role"]: instance for instance in status["fleet"]["instances"]}
    assert set(instances) == {"prefill", "decode"}
    assert {instance["state"] for instance in instances.values()} == {"ready"}
    assert [link["transport"] for link in instances["decode"]["links"]] == ["shared_memory"]
    assert "prefill-" in served.tandem("status").stdout
    request_id = served.tandem("explain").stdout.split("'")[1]
    explained = served.tandem("explain", f"cmpl-{request_id}").stdout
    assert re.search(r"^attempt 1, prefill on prefill-", explained, re.MULTILINE), explained
    assert re.search(r"^attempt 1, decode on decode-", explained, re.MULTILINE), explained
    unknown = served.tandem("explain", "nobody")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "does not remember a finished request 'nobody'" in unknown.stderr
    watch = [sys.executable, "-m", "tandem.cli.main", "status", "--watch", "--interval", "0.2"]
    with subprocess.Popen(watch, env=served.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert all(any(line.startswith("little: up ") for line in watching.stdout) for _ in range(2))
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 0
    doctor = served.tandem("doctor", f"--set=model={model}", *FREE_PORTS, *_SMALL)
    assert re.search(r"^ok +cluster: little .* 2 of 2 workers ready$", doctor.stdout, re.MULTILINE), doctor.stdout
    assert len(re.findall(r"^ok +request: over (?:HTTP|gRPC): two tokens in \d+ ms$", doctor.stdout, re.MULTILINE)) == 2
    pair = r"^ok +pair: prefill-0-\w+ -> decode-0-\w+: two tokens in \d+ ms$"
    assert re.search(pair, doctor.stdout, re.MULTILINE), doctor.stdout
    assert re.search(r"^ok +link: prefill-0-\w+ -> decode-0-\w+: shared_memory", doctor.stdout, re.MULTILINE)


def test_the_token_is_seen_nowhere(served: Served, folder: Path) -> None:
    """In no process list and no environment, in no output, and in no file that others may read."""
    (state,) = (folder / "state").glob("serve-*.json")
    token = json.loads(state.read_text())["cluster_token"].encode()
    assert len(token) >= 32
    processes = [psutil.Process(served.process.pid), *psutil.Process(served.process.pid).children(recursive=True)]
    assert len(processes) > 3
    for process in processes:
        for name in ("cmdline", "environ"):
            assert token not in Path(f"/proc/{process.pid}/{name}").read_bytes(), process
    holders = [path for path in folder.rglob("*") if path.is_file() and token in path.read_bytes()]
    assert state in holders
    for path in holders:
        assert path.stat().st_mode & 0o077 == 0, path
    assert token.decode() not in served.tandem("status", "--json").stdout


def test_workers_join_and_leave(served: Served) -> None:
    assert served.tandem("scale", "--decode", "2").returncode == 0
    served.wait_for(r"^scaling to 2 decode\n(.*\n)*scaled$")
    assert len(json.loads(served.tandem("status", "--json").stdout)["fleet"]["instances"]) == 3
    assert served.tandem("scale", "--decode", "1").returncode == 0
    served.wait_for(r"^scaling to 1 decode\n(.*\n)*scaled$")
    assert served.tandem("chat", "--complete", "--max-tokens", "4", stdin="still here\n").returncode == 0


def test_a_killed_worker_comes_back(served: Served) -> None:
    pid = served.wait_for(r"^  decode-0 up in .* \(pid (\d+)\)$")[1]
    os.kill(int(pid), signal.SIGKILL)
    served.wait_for(r"^  decode-0: its process died \(SIGKILL\); its log is \S+; starting it again in 0\.5 s$")
    served.wait_for(rf"^  decode-0 up in .* \(pid (?!{pid}\))\d+\)$")
    _until_completion(served)


def test_a_stopped_worker_is_replaced(served: Served) -> None:
    pid = served.wait_for(r"^  prefill-0 up in .* \(pid (\d+)\)$")[1]
    os.kill(int(pid), signal.SIGSTOP)
    began_s = time.monotonic()
    served.wait_for(r"^  prefill-0: it is stopped, as by SIGSTOP, for \d\.\d s; starting it again in 0\.5 s$")
    assert time.monotonic() - began_s < 10  # 0.6 s on an idle machine
    served.wait_for(rf"^  prefill-0 up in .* \(pid (?!{pid}\))\d+\)$")
    _until_completion(served)


@pytest.mark.slow
@pytest.mark.parametrize("server", ["gcs_server", "raylet"])
def test_requests_go_on_when_ray_dies(served: Served, server: str) -> None:
    """A stream that has begun before Ray's death and ends after it, and a worker that dies afterwards."""
    up = len(re.findall(r"^  Ray: up again", served.output.read_text(), re.MULTILINE))
    body = {"model": "little", "prompt": "x", "max_tokens": 200, "temperature": 0, "stream": True, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{served.http}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.readline().startswith(b"data: ")
        (victim,) = [process for process in family_of(served.process.pid) if process.name() == server]
        victim.kill()
        served.wait_for(rf"^  Ray: its {server} died; starting it again, while all processes go on$")
        assert response.read().endswith(b"data: [DONE]\n\n")
    served.wait_for(rf"(^  Ray: up again in [^$]*){{{up + 1}}}")
    pid = re.findall(r"^  decode-0 up in .* \(pid (\d+)\)$", served.output.read_text(), re.MULTILINE)[-1]
    os.kill(int(pid), signal.SIGKILL)
    served.wait_for(rf"^  decode-0 up in [^(]* \(pid {pid}\)\n(.*\n)*  decode-0 up in .* \(pid (?!{pid}\))\d+\)$")
    _until_completion(served)


def test_ctrl_c_leaves_nothing(served: Served, folder: Path) -> None:
    family = family_of(served.process.pid)
    assert any("raylet" in process.name() for process in family)
    before = {path.name for path in Path("/dev/shm").iterdir()}
    served.process.send_signal(signal.SIGINT)
    ended = wait_ended(served.process, served.output, 100)  # on a machine that does much else
    assert ended == 0, served.output.read_text()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert {path.name for path in folder.iterdir()} == {"output", "state"}
    assert {path.name for path in (folder / "state").iterdir()} == {"logs"}
    for address in (served.http, served.grpc):
        host, _, port = address.rpartition(":")
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))) != 0
    left = {path.name for path in Path("/dev/shm").iterdir()} - before
    assert [name for name in left if any(str(process.pid) in name for process in family)] == []
    assert "Traceback" not in served.output.read_text()
    assert served.tandem("status").returncode == 1


def test_settings_that_cannot_work_are_refused_at_once(model: Path, folder: Path) -> None:
    wrong = ["--set=decode.engine.device=cuda", "--set=prefill.engine.kv_memory=512", *FREE_PORTS]
    environment = {**os.environ, "TANDEM_STATE_DIR": str(folder / "state"), "CUDA_VISIBLE_DEVICES": ""}
    refused = run_python(["-m", "tandem.cli.main", "serve", f"--set=model={model}", *wrong], environment)
    assert refused.returncode == 2
    assert "decode.engine.device is cuda, but this machine has no GPU; set decode.engine.device to" in refused.stderr
    assert "prefill.engine.kv_memory is 512 bytes, which is room for 0 blocks" in refused.stderr
    assert "Ray" not in refused.stdout


@pytest.mark.parametrize(
    ("running", "queued", "text"),
    [
        (2, 1, ": waiting up to 10 s for 3 running requests"),
        (1, 0, ": waiting up to 10 s for 1 running request"),
        (0, 0, ""),
    ],
)
async def test_a_stop_says_what_it_waits_for(
    model: Path, monkeypatch: pytest.MonkeyPatch, running: int, queued: int, text: str
) -> None:
    async def fetch(control: str, token: str | None, tls: None) -> FleetDescription:
        return FleetDescription("little", 1.0, (), running, queued)

    monkeypatch.setattr(tandem.cli.welcome, "fetch_fleet", fetch)
    assert await tandem.cli.welcome.what_to_wait_for(ServeConfig(model=model), 10.0) == text


async def test_a_stop_does_not_wait_for_a_router_that_is_gone(model: Path) -> None:
    config = ServeConfig.model_validate({"model": model, "router": {"control": "127.0.0.1:1"}})
    assert await tandem.cli.welcome.what_to_wait_for(config, 10.0) == ""


def _until_completion(served: Served) -> None:
    """A worker that is up is unavailable until its router has heard of it, a heartbeat later."""
    body = json.dumps({"model": "little", "prompt": "x", "max_tokens": 4}).encode()
    request = urllib.request.Request(f"http://{served.http}/v1/completions", body, {"Content-Type": "application/json"})
    deadline_s = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                assert json.load(response)["usage"]["completion_tokens"] > 0
                return
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline_s:
                raise
        time.sleep(0.1)


@pytest.mark.slow
def test_a_start_after_a_kill_clears_away_and_takes_the_ports(model: Path) -> None:
    """Also where a worker was stopped: the kernel ends it with its parent."""
    with tempfile.TemporaryDirectory(prefix="t") as name:
        folder = Path(name)
        with serving(folder, f"--set=model={model}", *_SMALL) as served:
            family = family_of(served.process.pid)
            os.kill(int(served.wait_for(r"^  decode-0 up in .* \(pid (\d+)\)$")[1]), signal.SIGSTOP)
            served.process.kill()
            served.process.wait()
            (state,) = (folder / "state").glob("serve-*.json")
            control = json.loads(state.read_text())["control"]
            ports = [
                f"--set=router.{name}={address}"
                for name, address in (("http", served.http), ("grpc", served.grpc), ("control", control))
            ]
            process, _, output = start(folder, f"--set=model={model}", *_SMALL, ports=ports)
            try:
                wait_for(process, output, r"^Ctrl-C ends it\.$")
                _, alive = psutil.wait_procs(family, timeout=10)
                assert alive == []
                assert len(list(folder.glob("tandem-*"))) == 1
                assert len(list((folder / "state").glob("serve-*.json"))) == 1
                _until_completion(served)
            finally:
                process.terminate()
                process.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("after", ["starting Ray", "router-0 loading", "decode-0 up"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_early_end_leaves_nothing(model: Path, after: str, number: signal.Signals) -> None:
    with tempfile.TemporaryDirectory(prefix="t") as name:
        folder = Path(name)
        process, environment, output = start(folder, f"--set=model={model}", *_SMALL)
        wait_for(process, output, after)
        time.sleep(1.0)
        family = family_of(process.pid)
        process.send_signal(number)
        process.wait(60)
        # After a SIGKILL all that serves ends at once, by the kernel's hand; two idle agents of Ray take longer.
        _, alive = psutil.wait_procs(family, timeout=180)
        assert alive == []
        run_python(["-m", "tandem.cli.main", "status"], environment)  # clears away what a killed one could not
        assert {path.name for path in folder.iterdir()} == {"output", "state"}
        assert "Traceback" not in output.read_text()

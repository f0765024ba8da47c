"""`tandem router` and `tandem worker` as containers run them: found by name, probed, drained, replaced by new ones."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.core.session import Role
from tests.cluster.harness import START_TIMEOUT_S, Cluster, free_port
from tests.deploy.kubernetes.manifests import render

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
GRACE_S = "60"


class Containers(Cluster):
    """Its processes are commands, and the workers know the router by name."""

    def start(self, name: str, module: str, config: dict[str, Any]) -> None:
        command = "router" if "router" in config else "worker"
        path = self.folder / f"{name}.yaml"
        settings = {"model": str(self.model), "model_name": self.model.name, "cluster_token": Cluster.TOKEN}
        if command == "worker":
            config["routers"] = [f"localhost:{self.control_port}"]
        path.write_text(yaml.safe_dump(settings | config))
        overrides = [f"--set={each}" for each in self.overrides.pop(name, [])]
        with self.log_path(name).open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "tandem.cli.main", command, str(path), "--grace", GRACE_S, *overrides],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.overrides: dict[str, list[str]] = {}

    def probe(self, path: str) -> int:
        return httpx.get(f"{self.url}{path}", timeout=5.0).status_code

    def terminate(self, name: str) -> subprocess.Popen[bytes]:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        return process


@pytest.fixture
def containers(built_in_model: Path, tmp_path: Path) -> Iterator[Containers]:
    engine = {"threads": 1, "kv_memory": "64MiB", "dtype": "float32"}
    sections = {role: {"engine": engine} for role in ("prefill", "decode", "colocated")}
    cluster = Containers(built_in_model, tmp_path, **sections)
    try:
        yield cluster
        cluster.stop()
    finally:
        for process in cluster.processes.values():
            process.kill()


def health_of(port: int, service: str = "") -> int:
    async def ask() -> int:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            return int((await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)).status)

    return asyncio.run(ask())


def wait_until(is_met: Callable[[], bool], what: str, cluster: Containers) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError, grpc.RpcError):
            if is_met():
                return
        time.sleep(0.05)
    raise AssertionError(f"{what}: not in {START_TIMEOUT_S} s\n{cluster.logs()}")


def stream(cluster: Containers, num_tokens: int) -> Iterator[str]:
    """The pieces of a completion of so many tokens."""
    body = {"model": cluster.model.name, "prompt": "def f(", "max_tokens": num_tokens, "ignore_eos": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body | {"stream": True}, timeout=60.0) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                yield event["choices"][0]["text"]


def test_found_by_name_probed_and_drained(containers: Containers) -> None:
    containers.start_router()
    wait_until(lambda: containers.probe("/livez") == 200, "the router runs", containers)
    assert containers.probe("/readyz") == 503, "it has no workers yet"
    port = free_port()
    containers.overrides["colocated-0"] = [f"listen=127.0.0.1:{port}", "plan_epoch=a1"]
    containers.start_worker("colocated-0", Role.COLOCATED)
    wait_until(lambda: containers.probe("/readyz") == 200, "the worker has found the router", containers)
    assert [health_of(port), health_of(port, "liveness")] == [SERVING, SERVING]
    (status,) = containers.instances()
    assert (status.address, status.fingerprint.partition("@")[2]) == (f"127.0.0.1:{port}", "a1")

    pieces = stream(containers, 400)
    next(pieces)
    worker = containers.terminate("colocated-0")
    wait_until(lambda: containers.probe("/readyz") == 503, "no worker takes anything new", containers)
    assert health_of(port) == NOT_SERVING
    assert worker.poll() is None, "it finishes what it has"
    assert containers.probe("/livez") == 200
    for _ in pieces:
        pass
    assert worker.wait(30) == 0
    assert containers.terminate("router").wait(30) == 0


@pytest.mark.slow
def test_a_rolling_update_loses_nothing_and_pairs_nothing_old_with_new(containers: Containers) -> None:
    def start(name: str, role: Role, epoch: str) -> None:
        containers.overrides[name] = [f"plan_epoch={epoch}"]
        containers.start_worker(name, role)

    def wait_for(*names: str) -> None:
        def is_there() -> bool:
            return {status.instance_id.rsplit("-", 1)[0] for status in containers.instances()} == set(names)

        wait_until(is_there, f"{names} are the instances", containers)

    containers.start_router()
    start("prefill-old", Role.PREFILL, "old")
    start("decode-old", Role.DECODE, "old")
    wait_until(lambda: containers.probe("/readyz") == 200, "the old pair serves", containers)
    (pod,) = (each for each in render() if each["kind"] == "Pod")  # of `helm test`
    script = pod["spec"]["containers"][0]["args"][0].replace("r-tandem:8001", containers.grpc_address)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    num_served = 0
    stop = threading.Event()

    def keep_asking() -> None:
        nonlocal num_served
        while not stop.is_set():
            for _ in stream(containers, 100):
                pass
            num_served += 1

    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as at_end:
        client = pool.submit(keep_asking)
        at_end.callback(stop.set)
        start("prefill-new", Role.PREFILL, "new")
        wait_for("prefill-old", "decode-old", "prefill-new")
        containers.terminate("prefill-old").wait(90)
        wait_for("decode-old", "prefill-new")
        served_before = num_served
        wait_until(lambda: num_served > served_before + 1, "the old decode instance serves alone", containers)
        start("decode-new", Role.DECODE, "new")
        wait_for("decode-old", "prefill-new", "decode-new")
        containers.terminate("decode-old").wait(90)
        wait_for("prefill-new", "decode-new")
        served_before = num_served
        wait_until(lambda: num_served > served_before + 1, "the new pair serves", containers)
        (decode,) = (status for status in containers.instances() if status.role is Role.DECODE)
    client.result()
    assert [link.peer_id.rsplit("-", 1)[0] for link in decode.links] == ["prefill-new"]

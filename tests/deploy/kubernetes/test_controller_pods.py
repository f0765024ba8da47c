"""The chart's controller, router and instances as processes of this machine, and commands that change the cluster."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import yaml

from tests.deploy.kubernetes.fake_api import TOKEN, FakeKubernetes
from tests.deploy.kubernetes.manifests import NAMESPACE, ROOT, find, pod_templates, render
from tests.deploy.kubernetes.process_kubelet import ProcessKubelet

KIND = 'workers.kind="Controller"'
NAME = "r-tandem-controller"
_GROUP = {"instances": 1, "device": "cpu", "max_batch": 8, "kv_tokens": 8000}
PLAN = {
    "version": 1,
    "model": "/of/the/planner/tiny-python",
    "verdict": "disaggregate",
    "groups": [{"role": "prefill", "max_batch_tokens": 512} | _GROUP, {"role": "decode"} | _GROUP],
}
_START_S = 180.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.unmeasured]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Load:
    """Completions, one after the other, until it is stopped."""

    url: str
    answers: list[int] = field(default_factory=list)

    async def run(self) -> None:
        request = {"model": "tiny-python", "prompt": "def read_json(path):", "max_tokens": 24}
        async with httpx.AsyncClient(timeout=60) as client:
            while True:
                self.answers.append((await client.post(f"{self.url}/v1/completions", json=request)).status_code)


@dataclass
class Cluster:
    folder: Path
    kubernetes: FakeKubernetes
    kubelet: ProcessKubelet
    url: str
    environment: dict[str, str]
    controller: asyncio.subprocess.Process | None = None

    async def start(self, name: str, *arguments: str) -> asyncio.subprocess.Process:
        with (self.folder / f"{name}.log").open("ab") as output:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tandem.cli.main", *arguments, env=self.environment, stdout=output, stderr=output
            )

    async def start_controller(self) -> None:
        files = [str(self.folder / "settings.yaml"), "--pods", str(self.folder / "pods.yaml"), "--grace", "5"]
        self.controller = await self.start("controller", "controller", *files)

    async def tandem(self, *arguments: str) -> str:
        """What a command prints in the controller's pod."""
        status, output = await self.try_tandem(*arguments)
        assert status == 0, f"{arguments}: {output}\n{self.logs()}"
        return output

    async def try_tandem(self, *arguments: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tandem.cli.main",
            *arguments,
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        return process.returncode, output.decode()

    async def wait_up(self, *expected: tuple[str, str]) -> None:
        """Until just these instances (name, role) are up, and a router knows them as ready."""
        async with asyncio.timeout(_START_S):
            while True:
                code, output = await self.try_tandem("status", "--json")  # 1 until the controller serves
                status = json.loads(output) if code == 0 else {}
                known = (status.get("cluster") or {}).get("processes", ())
                processes = [each for each in known if each["state"] != "drained"]
                up = {(each["name"], each["role"]) for each in processes if each["state"] == "up"}
                instances = (status.get("fleet") or {}).get("instances", ())
                ready = [each for each in instances if each["state"] == "ready"]
                if up == set(expected) and len(processes) == len(ready) == len(expected):
                    return
                await asyncio.sleep(0.5)

    def pids(self) -> dict[str, int]:
        """By pod."""
        return {name: process.pid for name, process in self.kubelet.processes.items()}

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))


@asynccontextmanager
async def running_cluster(folder: Path) -> AsyncIterator[Cluster]:
    """The chart's defaults with a controller; names and paths of Kubernetes stand for some of this machine."""
    documents = render(None, KIND, "router.replicas=1")
    ports = {port: free_port() for port in (8000, 8001, 8002, 8003)}
    (folder / "token").write_text("the-token-of-the-cluster")
    services = {f"r-tandem.{NAMESPACE}.svc", f"r-tandem-control.{NAMESPACE}.svc", f"{NAME}.{NAMESPACE}.svc", "0.0.0.0"}
    places = {f"{host}:{port}": f"127.0.0.1:{here}" for host in services for port, here in ports.items()}
    places |= {"/run/secrets/tandem": str(folder), "/opt/tandem/models": str(ROOT / "models")}
    kubelet = ProcessKubelet(folder, places)
    objects = [find(documents, kind, NAME) for kind in ("ConfigMap", "Deployment")]
    kubernetes = kubelet.kubernetes = FakeKubernetes(kubelet, find(documents, "Role", NAME)["rules"], objects)
    annotations = find(documents, "Deployment", NAME)["spec"]["template"]["metadata"]["annotations"]
    for file in ("settings", "pods"):
        (folder / f"{file}.yaml").write_text(kubelet.localized(annotations[f"tandem.serve/{file}"]))
    (router,) = (each for each in pod_templates(documents) if each["spec"]["containers"][0]["name"] == "router")
    (folder / "router.yaml").write_text(kubelet.localized(router["metadata"]["annotations"]["tandem.serve/settings"]))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(kubernetes.serve())
        stack.push_async_callback(kubelet.close)
        (folder / "kubeconfig.yaml").write_text(yaml.safe_dump(kubeconfig(kubernetes.url)))
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TANDEM_STATE_DIR": str(folder / "state"),
            "KUBECONFIG": str(folder / "kubeconfig.yaml"),
            "OMP_NUM_THREADS": "1",
        }
        cluster = Cluster(folder, kubernetes, kubelet, f"http://127.0.0.1:{ports[8000]}", environment)
        started = [await cluster.start("router", "router", str(folder / "router.yaml"), "--set", "advertise=127.0.0.1")]
        try:
            await cluster.start_controller()
            yield cluster
        finally:
            for process in filter(None, (*started, cluster.controller)):
                if process.returncode is None:
                    process.kill()
                    await process.wait()


def kubeconfig(url: str) -> dict[str, object]:
    context = {"cluster": "fake", "user": "controller", "namespace": NAMESPACE}
    return {
        "clusters": [{"name": "fake", "cluster": {"server": url}}],
        "users": [{"name": "controller", "user": {"token": TOKEN}}],
        "contexts": [{"name": "fake", "context": context}],
        "current-context": "fake",
    }


async def test_commands_change_a_cluster_under_load(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        await cluster.wait_up(("prefill-0", "prefill"), ("decode-0", "decode"))
        load = Load(cluster.url)
        loading = asyncio.create_task(load.run())
        try:
            before = cluster.pids()
            assert "started decode-1" in await cluster.tandem("scale", "--decode", "2")
            await cluster.wait_up(("prefill-0", "prefill"), ("decode-0", "decode"), ("decode-1", "decode"))

            await cluster.tandem("role", "decode-1", "colocated")
            await cluster.wait_up(("prefill-0", "prefill"), ("decode-0", "decode"), ("decode-1", "colocated"))

            assert "decode-1-" in await cluster.tandem("logs", "decode-1", "-n", "5")

            model = f"model={ROOT / 'models' / 'tiny-python'}"  # a serve file is not at hand in the pod
            changed = await cluster.tandem("apply", "--set", model, "--set", "prefill.instances=2")
            assert re.search("no process had to start or to stop", changed), cluster.logs()
            await cluster.wait_up(("prefill-0", "prefill"), ("decode-0", "decode"), ("decode-1", "prefill"))
            assert cluster.pids().items() > before.items(), "no process was replaced"

            assert cluster.controller is not None
            cluster.controller.send_signal(signal.SIGKILL)
            await cluster.controller.wait()
            kept = cluster.pids()
            await cluster.start_controller()
            await asyncio.sleep(1.0)
            await cluster.wait_up(("prefill-0", "prefill"), ("decode-0", "decode"), ("decode-1", "prefill"))
            assert cluster.pids() == kept, "the next controller takes the pods back"

            (victim,) = (name for name in kept if "-prefill-0-" in name)
            os.kill(kept[victim], signal.SIGKILL)
            await asyncio.sleep(1.0)
            await cluster.wait_up(("prefill-0", "prefill"), ("decode-0", "decode"), ("decode-1", "prefill"))
            assert victim not in cluster.pids()

            assert "stopped decode-1" in await cluster.tandem("drain", "decode-1")
            assert len(cluster.pids()) == 2

            plan = tmp_path / "plan.yaml"
            plan.write_text(yaml.safe_dump(PLAN))
            before = cluster.pids()  # the only ones of their role: their successors are up before they leave
            assert "replaced " in await cluster.tandem("apply", str(plan), "--set", model)
            await cluster.wait_up(("prefill-0", "prefill"), ("decode-0", "decode"))
            assert not before.keys() & cluster.pids().keys()
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
        assert set(load.answers) == {200}, f"{load.answers}\n{cluster.logs()}"
        assert len(load.answers) > 20

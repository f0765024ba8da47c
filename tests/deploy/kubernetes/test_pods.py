"""The pods of the chart's defaults, run without Kubernetes, and yet with what it would allow them."""

import time
from pathlib import Path

import pytest

from tests.deploy.kubernetes.manifests import NAMESPACE, pod_templates, render
from tests.deploy.kubernetes.pods import is_possible, pod_network

START_TIMEOUT_S = 180.0
_STATUS = """
import httpx
print(httpx.get("http://127.0.0.1:8000{path}", timeout=5).status_code)
"""
_HEALTH = """
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
with grpc.insecure_channel("{address}") as channel:
    request = health_pb2.HealthCheckRequest(service="{service}")
    print(health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status)
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not is_possible(), reason="needs root, and namespaces")
def test_pods_run_with_what_kubernetes_allows_them(tmp_path: Path) -> None:
    documents = render()
    templates = {each["spec"]["containers"][0]["name"]: each for each in pod_templates(documents)}
    workers = {
        each["metadata"]["labels"]["tandem.serve/group"]: each
        for each in pod_templates(documents)
        if "tandem.serve/group" in each["metadata"]["labels"]
    }
    ips = dict(zip(("router", *workers), ("10.77.0.1", "10.77.0.2", "10.77.0.3"), strict=True))
    with pod_network(tmp_path, list(ips.values()), [f"r-tandem-control.{NAMESPACE}.svc", "r-tandem"]) as pods:
        for name, template in (("router", templates["router"]), *workers.items()):
            pods.start(name, template, ips[name])
        deadline = time.monotonic() + START_TIMEOUT_S
        while pods.run(_STATUS.format(path="/readyz")).stdout != "200\n":
            ended = {name: process.poll() for name, process in pods.processes.items() if process.poll() is not None}
            assert not ended, f"{ended}\n{pods.logs()}"
            assert time.monotonic() < deadline, pods.logs()
            time.sleep(0.5)
        for name in pods.processes:
            rights = pods.rights(name)
            assert set(rights["Uid"].split()) == set(rights["Gid"].split()) == {"10001"}
            assert (int(rights["CapEff"], 16), int(rights["CapBnd"], 16), rights["NoNewPrivs"]) == (0, 0, "1")
            assert rights["/"].startswith("ro,")
        assert pods.run(_STATUS.format(path="/livez")).stdout == "200\n"
        for name, template in workers.items():
            (container,) = template["spec"]["containers"]
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                grpc = container[probe]["grpc"]
                script = _HEALTH.format(address=f"{ips[name]}:{grpc['port']}", service=grpc.get("service", ""))
                assert pods.run(script).stdout == "1\n", f"{name}: {probe}"
        script = templates["completion"]["spec"]["containers"][0]["args"][0]  # of `helm test`
        answered = pods.run(script.replace("r-tandem:", "127.0.0.1:"))
        assert answered.returncode == 0, f"{answered.stderr}\n{pods.logs()}"
        for name in (*workers, "router"):
            grace_s = (workers.get(name) or templates["router"])["spec"]["terminationGracePeriodSeconds"]
            assert pods.terminate(name, grace_s) == 0, pods.logs()
        assert "Permission" not in pods.logs()
        assert "Read-only" not in pods.logs()

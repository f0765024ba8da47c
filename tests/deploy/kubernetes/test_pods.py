"""Pods of the chart, run without Kubernetes, and yet with what it would allow them."""

import json
import time
from pathlib import Path

import pytest

from tandem.engine.ops.native_library import load_native_library
from tests.cluster.test_same_tokens import NUM_NEW_TOKENS, prompts, reference_tokens
from tests.deploy.kubernetes.manifests import (
    NAMESPACE,
    ROOT,
    find,
    leader_address,
    pod_templates,
    pods_of_instance,
    render,
)
from tests.deploy.kubernetes.pods import Pods, is_possible, pod_network

START_TIMEOUT_S = 180.0
CONTROL = f"r-tandem-control.{NAMESPACE}.svc"
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

_TOKENS = """
import asyncio, json
from tandem import AsyncClient
async def answer(prompts):
    async with AsyncClient("127.0.0.1:8001") as client:
        ask = dict(max_tokens={num_tokens}, temperature=0.0, ignore_eos=True, timeout_s=100.0)
        completions = await asyncio.gather(*(client.generate(token_ids=each, **ask) for each in prompts))
        return [list(each.token_ids) for each in completions]
print(json.dumps(asyncio.run(answer({prompts}))))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not is_possible(), reason="needs root, and namespaces"),
]


def wait_ready(pods: Pods, status: int = 200) -> None:
    """Until the router takes requests, or with 503, until it knows no instance any more."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while pods.run(_STATUS.format(path="/readyz")).stdout != f"{status}\n":
        ended = {name: process.poll() for name, process in pods.processes.items() if process.poll() is not None}
        assert not ended, f"{ended}\n{pods.logs()}"
        assert time.monotonic() < deadline, pods.logs()
        time.sleep(0.5)


def check_rights(pods: Pods) -> None:
    for name in pods.processes:
        rights = pods.rights(name)
        assert set(rights["Uid"].split()) == set(rights["Gid"].split()) == {"10001"}
        assert (int(rights["CapEff"], 16), int(rights["CapBnd"], 16), rights["NoNewPrivs"]) == (0, 0, "1")
        assert rights["/"].startswith("ro,")


def test_pods_run_with_what_kubernetes_allows_them(tmp_path: Path) -> None:
    documents = render()
    templates = {each["spec"]["containers"][0]["name"]: each for each in pod_templates(documents)}
    workers = {
        each["metadata"]["labels"]["tandem.serve/group"]: each
        for each in pod_templates(documents)
        if "tandem.serve/group" in each["metadata"]["labels"]
    }
    ips = dict(zip(("router", *workers), ("10.77.0.1", "10.77.0.2", "10.77.0.3"), strict=True))
    with pod_network(tmp_path, list(ips.values()), dict.fromkeys((CONTROL, "r-tandem"), "127.0.0.1")) as pods:
        for name, template in (("router", templates["router"]), *workers.items()):
            pods.start(name, template, ips[name])
        wait_ready(pods)
        check_rights(pods)
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


def test_the_pods_of_an_instance_are_one_instance(tmp_path: Path) -> None:
    """Two pods of a LeaderWorkerSet answer as transformers does; when one is killed, both start again as the operator
    makes them; when both are to end, whichever is told first, they end after the last request."""
    group = {"name": "both", "role": "colocated", "ranksPerPod": [1, 1]}
    group["instance"] = {"engine": {"pp": 2, "dtype": "float32", "kv_memory": "64MiB"}}
    documents = render(None, 'workers.kind="LeaderWorkerSet"', f"workers.groups={json.dumps([group])}")
    lws = find(documents, "LeaderWorkerSet", "r-tandem-both")
    router = find(documents, "Deployment", "r-tandem-router")["spec"]["template"]
    rank_0, others = pods_of_instance(lws)
    leader = leader_address(lws, 0)
    questions = [each for each in prompts(4000) if len(each) < 300][:8]
    wanted = [reference_tokens(ROOT / "models" / "tiny-python", tuple(each)) for each in questions]
    names = {CONTROL: "127.0.0.1", leader: "10.77.0.2"}
    kernels = tmp_path / "kernels"
    load_native_library(kernels)
    with pod_network(tmp_path, ["10.77.0.1", "10.77.0.2", "10.77.0.3"], names, kernels) as pods:

        def start_instance() -> None:
            pods.start("both-0-1", others, "10.77.0.3", LWS_LEADER_ADDRESS=leader)
            pods.start("both-0", rank_0, "10.77.0.2", LWS_LEADER_ADDRESS=leader)

        def check_answers() -> None:
            answered = pods.run(_TOKENS.format(prompts=questions, num_tokens=NUM_NEW_TOKENS))
            assert answered.returncode == 0, f"{answered.stderr}\n{pods.logs()}"
            assert json.loads(answered.stdout) == wanted

        pods.start("router", router, "10.77.0.1")
        start_instance()
        wait_ready(pods)
        check_rights(pods)
        check_answers()
        pods.kill("both-0-1")
        assert pods.wait("both-0", 30.0) == 1, pods.logs()
        wait_ready(pods, 503)
        start_instance()
        wait_ready(pods)
        check_answers()
        pods.signal("both-0-1")
        time.sleep(1.0)
        check_answers()
        assert pods.terminate("both-0", 60.0) == 0, pods.logs()
        assert pods.wait("both-0-1", 30.0) == 0, pods.logs()

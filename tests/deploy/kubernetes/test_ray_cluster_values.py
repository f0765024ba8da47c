"""The chart with `workers.kind: RayCluster`: what KubeRay refuses, and whether the controller finds room for all."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tandem.core.config import RouterConfig, ServeConfig
from tandem.core.config_file import load_config
from tandem.deploy.node_placement import NodePlacement, RayNode, Seat
from tandem.deploy.topology import Machine, plan_processes
from tests.deploy.kubernetes.manifests import CHART, NAMESPACE, ROOT, Document, find, kuberay_mistakes, render

VALUES = CHART / "ci" / "ray-values.yaml"


@pytest.fixture(scope="module")
def documents() -> tuple[Document, ...]:
    return render(VALUES)


def cluster_of(documents: tuple[Document, ...]) -> Document:
    return find(documents, "RayCluster", "chat")


def settings_of(template: Document, folder: Path) -> Path:
    path = folder / "settings.yaml"
    path.write_text(template["metadata"]["annotations"]["tandem.serve/settings"])
    return path


def test_kuberay_takes_it(documents: tuple[Document, ...]) -> None:
    assert kuberay_mistakes(cluster_of(documents)) == []
    assert [each["metadata"]["name"] for each in documents if each["kind"] == "Deployment"] == ["chat-router"]


def test_pods_of_one_instance_reach_each_other(documents: tuple[Document, ...]) -> None:
    """At ports that Ray's launcher and the system choose."""
    worker = find(documents, "NetworkPolicy", "chat-worker")["spec"]
    (rule,) = (
        rule
        for rule in worker["ingress"]
        if rule["from"] == [{"podSelector": {"matchLabels": worker["podSelector"]["matchLabels"]}}]
    )
    assert "ports" not in rule


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda each: each["metadata"].update(name="7b"), "the name 7b"),
        (lambda each: each["spec"].pop("rayVersion"), "a token needs rayVersion"),
        (lambda each: each["spec"]["workerGroupSpecs"][0].pop("minReplicas"), "minReplicas <= replicas"),
        (lambda each: each["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "are strings"),
        (lambda each: each["spec"]["workerGroupSpecs"][1].update(groupName="prefill"), "two groups have one name"),
        (lambda each: each["spec"].update(upgradeStrategy={"type": "NewCluster"}), "is Recreate or None"),
    ],
)
def test_the_rules_find_mistakes(documents: tuple[Document, ...], change: Any, sentence: str) -> None:
    """Else the test above would show nothing."""
    document = deepcopy(cluster_of(documents))
    change(document)
    (mistake,) = kuberay_mistakes(document)
    assert sentence in mistake


def test_each_instance_has_a_pod_of_its_group(documents: tuple[Document, ...], tmp_path: Path) -> None:
    """The controller's own placement, on the nodes that Ray would have."""
    spec = cluster_of(documents)["spec"]
    config = load_config(settings_of(spec["headGroupSpec"]["template"], tmp_path), ServeConfig)
    assert config.cluster_token == "file:/run/secrets/tandem/token"
    processes = plan_processes(config, Machine(cores=8, gpus=1, nodes=2))  # the others are still starting
    assert {process.gpus for process in processes} == {1.0, 8.0}
    nodes = []
    for group in spec["workerGroupSpecs"]:
        parameters = group["rayStartParams"]
        resources = {"CPU": float(parameters["num-cpus"]), "GPU": float(parameters["num-gpus"])}
        resources |= json.loads(json.loads(parameters["resources"]))
        nodes += [RayNode(f"{group['groupName']}-{i}", "10.0.0.1", resources) for i in range(group["replicas"])]
    placement = NodePlacement()
    placed = {process.name: placement.choose(process, nodes) for process in processes}
    wide = placed.pop("colocated-0")
    assert len(placed) == 8
    assert placed == {name: (Seat(name, 1),) for name in placed}
    assert sorted(wide, key=str) == [Seat("wide-0", 4), Seat("wide-1", 4)]


def test_routers_find_the_controller(documents: tuple[Document, ...], tmp_path: Path) -> None:
    template = find(documents, "Deployment", "chat-router")["spec"]["template"]
    router = load_config(settings_of(template, tmp_path), RouterConfig)
    assert router.controller is not None
    host, port = router.controller.split(":")
    service = find(documents, "Service", host.removesuffix(f".{NAMESPACE}.svc"))
    head = cluster_of(documents)["spec"]["headGroupSpec"]["template"]
    assert service["spec"]["selector"].items() <= head["metadata"]["labels"].items()
    (container,) = head["spec"]["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports[service["spec"]["ports"][0]["targetPort"]] == service["spec"]["ports"][0]["port"] == int(port)
    config = load_config(settings_of(head, tmp_path), ServeConfig)
    assert config.controller.endswith(f":{port}")
    assert "advertise=$(POD_IP)" in template["spec"]["containers"][0]["args"]


def test_the_version_of_ray_is_that_of_the_image(documents: tuple[Document, ...]) -> None:
    assert f"ray=={cluster_of(documents)['spec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    assert "[serve,ray,kubernetes]" in (ROOT / "Dockerfile").read_text()

"""`tandem render-k8s`: the plan that runs on a laptop, for Kubernetes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.cli.main import main
from tandem.core.config import WorkerConfig
from tandem.core.config_file import load_config
from tandem.core.plan import Plan
from tandem.deploy.plan_serving import serve_config_of
from tandem.deploy.topology import Machine
from tests.deploy.kubernetes.manifests import HELM, ROOT, find, mistakes_of, pod_templates, render, require_helm

EXAMPLES = ROOT / "examples"
GPU_PLAN: dict[str, Any] = {
    "version": 1,
    "model": "Llama-3.1-8B",
    "verdict": "mixed",
    "slo": [{"name": "chat", "ttft_s": 0.5, "tpot_s": 0.05}],
    "groups": [
        {"role": "prefill", "instances": 3, "device": "H100-80GB-SXM5", "kv_tokens": 200_000},
        {"role": "decode", "instances": 5, "device": "A100-80GB-SXM", "max_batch": 256, "kv_tokens": 400_000},
        {"role": "colocated", "instances": 1, "device": "H100-80GB-SXM5", "tp": 2, "kv_tokens": 500_000},
    ],
}
FROM_CLAIM = ["--set=model.source=persistentVolumeClaim", "--set=model.persistentVolumeClaim=checkpoints"]


@pytest.fixture
def gpu_plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(GPU_PLAN))
    return path


@pytest.mark.parametrize("plan", sorted(EXAMPLES.glob("plan-*.yaml")), ids=lambda path: path.stem)
def test_pods_run_what_tandem_serve_would_run(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_helm()
    values, manifests = tmp_path / "values.yaml", tmp_path / "manifests.yaml"
    arguments = ["render-k8s", str(plan), "-o", str(values), "--manifests", str(manifests), "--helm", str(HELM)]
    assert main(arguments) == 0
    assert "kubectl create secret generic tandem-token" in capsys.readouterr().out
    documents = tuple(yaml.safe_load_all(manifests.read_text()))
    assert [mistake for document in documents for mistake in mistakes_of(document, "1.34")] == []
    assert "Secret" not in {document["kind"] for document in documents}, "manifests are no place for a token"

    served = serve_config_of(load_config(plan, Plan), Machine(cores=64))
    wanted = [(role, section.instances, section) for role, section in served.kinds]
    found = []
    for document in documents:
        for template in pod_templates((document,)):
            if template["metadata"]["labels"]["app.kubernetes.io/component"] == "worker":
                path = tmp_path / "settings.yaml"
                path.write_text(template["metadata"]["annotations"]["tandem.serve/settings"])
                worker = load_config(path, WorkerConfig)
                assert worker.instance.engine.threads >= worker.instance.engine.shape.num_ranks
                engine = worker.instance.engine.model_copy(update={"threads": 0})
                found.append((worker.role, document["spec"]["replicas"], engine, worker.instance.max_batch_tokens))
    expected = [(role, count, section.engine, section.max_batch_tokens) for role, count, section in wanted]
    assert sorted(found, key=repr) == sorted(expected, key=repr)


def test_a_plan_for_gpus(gpu_plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = tmp_path / "values.yaml"
    assert main(["render-k8s", str(gpu_plan), "-o", str(values)]) == 2
    assert "which pods do not see; say where they find it: --set model.source=" in capsys.readouterr().err
    assert not values.exists()
    assert main(["render-k8s", str(gpu_plan), "-o", str(values), *FROM_CLAIM]) == 0
    assert "note: the plan has devices of several kinds" in capsys.readouterr().err
    groups = yaml.safe_load(values.read_text())["workers"]["groups"]
    assert [(each["name"], each["replicas"], each["gpus"]) for each in groups] == [
        ("prefill", 3, 1),
        ("decode", 5, 1),
        ("colocated", 1, 2),
    ]
    assert all(each["instance"]["engine"]["device"] == "cuda" for each in groups)
    weights_mib = 8.03e9 * 2 / 2**20
    memory = [int(each["resources"]["limits"]["memory"].removesuffix("Mi")) for each in groups]
    assert all(weights_mib < each < weights_mib + 4200 for each in memory), memory
    documents = render(values)
    (router,) = find(documents, "Deployment", "r-tandem-router")["spec"]["template"]["metadata"]["annotations"].values()
    assert yaml.safe_load(router)["router"]["slo"][0]["name"] == "chat"
    colocated = find(documents, "Deployment", "r-tandem-colocated")["spec"]["template"]["spec"]["containers"][0]
    assert colocated["resources"]["limits"]["nvidia.com/gpu"] == 2


def devices(**per_node: int) -> list[str]:
    """Of one instance: `a=2` are two of the node a."""
    return [f"{node}:{index}" for node, number in per_node.items() for index in range(number)]


def test_an_instance_on_several_nodes_has_several_pods(gpu_plan: Path, tmp_path: Path) -> None:
    """Instances of a kind that are not divided over nodes alike are groups of their own."""
    shape = {"role": "colocated", "device": "H100-80GB-SXM5", "tp": 2, "pp": 3, "kv_tokens": 500_000}
    on_nodes = [devices(a=4, b=2), devices(c=6), devices(d=2, e=2, f=2), devices(g=4, h=2), devices(i=6)]
    groups = [shape | {"instances": len(on_nodes), "devices": on_nodes}]
    gpu_plan.write_text(yaml.safe_dump(GPU_PLAN | {"groups": groups}))
    values = tmp_path / "values.yaml"
    assert main(["render-k8s", str(gpu_plan), "-o", str(values), *FROM_CLAIM]) == 0
    workers = yaml.safe_load(values.read_text())["workers"]
    assert workers["kind"] == "LeaderWorkerSet"
    assert [(each["name"], each["replicas"], each.get("ranksPerPod"), each["gpus"]) for each in workers["groups"]] == [
        ("colocated-0", 2, [4, 2], 6),
        ("colocated-1", 2, None, 6),
        ("colocated-2", 1, [2, 2, 2], 6),
    ]
    cpus = [int(each["resources"]["requests"]["cpu"]) for each in workers["groups"]]
    memory = [int(each["resources"]["limits"]["memory"].removesuffix("Mi")) for each in workers["groups"]]
    assert cpus == [4, 6, 2], "the ranks of the largest pod"
    assert memory == pytest.approx([memory[1] * number / 6 for number in cpus], abs=1)
    documents = render(values)
    assert [mistake for document in documents for mistake in mistakes_of(document, "1.34")] == []
    sizes = [
        document["spec"]["leaderWorkerTemplate"]["size"]
        for document in documents
        if document["kind"] == "LeaderWorkerSet"
    ]
    assert sizes == [2, 1, 3]


@pytest.mark.parametrize(
    ("per_node", "per_pod"),
    [({"a": 6}, None), ({"a": 2, "b": 1, "c": 2}, [1, 2, 2]), ({"a": 4, "b": 2, "c": 2}, [4, 2, 2])],
)
def test_the_pod_that_is_unlike_the_others_is_the_first(
    per_node: dict[str, int], per_pod: list[int] | None, gpu_plan: Path, tmp_path: Path
) -> None:
    group = {"role": "colocated", "device": "H100-80GB-SXM5", "pp": sum(per_node.values()), "kv_tokens": 500_000}
    groups = [group | {"instances": 1, "devices": [devices(**per_node)]}]
    gpu_plan.write_text(yaml.safe_dump(GPU_PLAN | {"groups": groups}))
    values = tmp_path / "values.yaml"
    assert main(["render-k8s", str(gpu_plan), "-o", str(values), *FROM_CLAIM]) == 0
    assert yaml.safe_load(values.read_text())["workers"]["groups"][0].get("ranksPerPod") == per_pod


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"verdict": "infeasible", "summary": "too slow."}, "this plan misses its targets (too slow)"),
        ({"groups": [], "verdict": "infeasible"}, "the plan has no instances"),
        ({"groups": [GPU_PLAN["groups"][0] | {"dp": 2}, GPU_PLAN["groups"][1]]}, "divides experts over ranks"),
        (
            {"groups": [GPU_PLAN["groups"][2] | {"pp": 3, "devices": [devices(a=1, b=2, c=3)]}]},
            "1, 2, 3 ranks on its nodes; all pods of an instance but the first are alike",
        ),
    ],
)
def test_a_plan_that_cannot_run(
    changes: dict[str, Any], sentence: str, gpu_plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_plan.write_text(yaml.safe_dump(GPU_PLAN | changes))
    assert main(["render-k8s", str(gpu_plan), "-o", str(gpu_plan.with_name("v.yaml")), *FROM_CLAIM]) == 2
    assert sentence in capsys.readouterr().err


def test_manifests_need_helm(gpu_plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = ["-o", str(tmp_path / "v.yaml"), "--manifests", str(tmp_path / "m.yaml"), "--helm", "no-such-helm"]
    assert main(["render-k8s", str(gpu_plan), *outputs, *FROM_CLAIM]) == 1
    assert "there is no no-such-helm here, which --manifests needs" in capsys.readouterr().err

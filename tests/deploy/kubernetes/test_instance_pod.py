"""Pods as the controller makes them of what the chart writes."""

import json
from pathlib import Path

import pytest
import yaml

from tandem.core.config import ServeConfig, WorkerConfig
from tandem.core.config_file import load_config
from tandem.core.errors import ConfigError
from tandem.deploy.desired import Desired
from tandem.deploy.kubernetes.instance_pod import (
    SETTINGS,
    PodSettings,
    end_of,
    make_pod,
    owner_of,
    reason_of_wait,
    spec_of,
)
from tandem.deploy.topology import Machine, ProcessSpec
from tests.deploy.kubernetes.manifests import CHART, KUBERNETES_VERSIONS, Document, find, mistakes_of, render

VALUES = CHART / "ci" / "controller-values.yaml"
SECRET = "the-secret-itself"
OWNER = owner_of({"metadata": {"name": "chat-controller", "uid": "6c7b2f3e"}})


def chart_files(folder: Path, values: Path | None = VALUES, *settings: str) -> tuple[ServeConfig, PodSettings]:
    """What the controller reads in its pod."""
    documents = render(values, 'workers.kind="Controller"', *settings)
    name = "chat-controller" if values else "r-tandem-controller"
    annotations = find(documents, "Deployment", name)["spec"]["template"]["metadata"]["annotations"]
    (folder / "settings.yaml").write_text(annotations["tandem.serve/settings"])
    (folder / "pods.yaml").write_text(annotations["tandem.serve/pods"])
    return load_config(folder / "settings.yaml", ServeConfig), load_config(folder / "pods.yaml", PodSettings)


def specs_of(config: ServeConfig) -> dict[str, ProcessSpec]:
    with_secret = config.model_copy(update={"cluster_token": SECRET})
    return {spec.name: spec for spec in Desired(with_secret).processes(Machine(cores=1, nodes=1))}


def test_each_instance_gets_a_pod_of_its_group(tmp_path: Path) -> None:
    config, settings = chart_files(tmp_path)
    specs = specs_of(config)
    assert list(specs) == ["prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2", "decode-3", "decode-4"]
    pods = {name: make_pod(spec, settings, config.cluster_token, OWNER) for name, spec in specs.items()}
    for name, pod in pods.items():
        for version in KUBERNETES_VERSIONS:
            assert mistakes_of(pod, version) == []
        assert SECRET not in json.dumps(pod)
        assert pod["spec"]["restartPolicy"] == "Never"
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["metadata"]["ownerReferences"] == [OWNER]
        path = tmp_path / "worker.yaml"
        path.write_text(pod["metadata"]["annotations"][SETTINGS])
        worker = load_config(path, WorkerConfig)
        assert (worker.name, worker.role) == (name, name.rpartition("-")[0])
        assert worker.cluster_token == "file:/run/secrets/tandem/token"
        assert worker.routers == ("chat-control.inference.svc:8002",)
        assert worker.plan_epoch == settings.plan_epoch
        assert worker.instance.engine.threads == 8
        assert worker.instance.engine.device == "cuda"
        assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert spec_of(pod, settings, SECRET).can_become(specs[name])
    assert len({pod["metadata"]["name"] for pod in pods.values()}) == len(pods)
    groups = {name: pod["metadata"]["labels"]["tandem.serve/group"] for name, pod in pods.items()}
    assert groups == {
        "prefill-0": "prefill",
        "prefill-1": "prefill",
        "decode-0": "decode",
        "decode-1": "decode",
        "decode-2": "decode",
        "decode-3": "decode",
        "decode-4": "wide",
    }
    assert pods["decode-4"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H200"}


def test_a_pod_has_the_gpus_of_its_instance(tmp_path: Path) -> None:
    """A plan that was applied may need others than the chart knew of."""
    config, settings = chart_files(tmp_path)
    engine = config.prefill[0].engine
    for ranks, device, gpus in ((2, "cuda", 2), (1, "cpu", None)):
        changed = engine.model_copy(update={"tp": ranks, "device": device})
        section = config.prefill[0].model_copy(update={"engine": changed})
        spec = specs_of(config.model_copy(update={"prefill": (section,)}))["prefill-0"]
        pod = make_pod(spec, settings, None, OWNER)
        assert pod["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") == gpus


def test_an_instance_of_a_role_without_a_group_gets_a_pod_all_the_same(tmp_path: Path) -> None:
    config, settings = chart_files(tmp_path)
    section = config.prefill[0].model_copy(update={"instances": 1})
    specs = specs_of(config.model_copy(update={"prefill": (), "decode": (), "colocated": (section,)}))
    assert settings.group_of(specs["colocated-0"]).name == "prefill"
    unknown = section.model_copy(update={"pod_group": "fast"})
    specs = specs_of(config.model_copy(update={"prefill": (), "decode": (), "colocated": (unknown,)}))
    with pytest.raises(
        ConfigError, match="has the pod_group 'fast', and the chart has the groups prefill, decode, wide"
    ):
        make_pod(specs["colocated-0"], settings, None, OWNER)


def test_a_pod_of_another_epoch_has_to_be_replaced(tmp_path: Path) -> None:
    config, settings = chart_files(tmp_path)
    spec = specs_of(config)["decode-0"]
    pod = make_pod(spec, settings, None, OWNER)
    later = settings.model_copy(update={"plan_epoch": "another"})
    assert spec_of(pod, settings, SECRET).can_become(spec)
    assert not spec_of(pod, later, SECRET).can_become(spec)


def test_the_epoch_changes_with_the_pods_and_not_with_settings(tmp_path: Path) -> None:
    def epoch(*settings: str) -> str:
        return chart_files(tmp_path, None, *settings)[1].plan_epoch

    same = (
        "workers.defaults.replicas=3",
        'workers.defaults.instance={"max_batch": 7}',
        'router.settings={"max_queue": 5}',
    )
    assert {epoch(each) for each in same} == {epoch()}
    others = ('image.tag="2"', 'workers.defaults.nodeSelector={"a": "b"}', 'planEpoch="3"')
    assert len({epoch(), *map(epoch, others)}) == 1 + len(others)


# --- what the fields of a pod mean -----------------------------------------------------------------------------------


def pod_with(**status: object) -> Document:
    return {"metadata": {"name": "chat-decode-0-1"}, "status": status}


def test_why_a_pod_has_ended() -> None:
    assert end_of(pod_with(phase="Running")) is None
    message = "loading\n/models has no config.json\n"
    state = {"terminated": {"exitCode": 1, "reason": "Error", "message": message}}
    ended = end_of(pod_with(phase="Failed", containerStatuses=[{"name": "worker", "state": state}]))
    assert ended is not None
    assert not ended.was_asked
    assert ended.reason == (
        "its pod chat-decode-0-1 has ended; worker ended with status 1 (Error): /models has no config.json"
    )
    evicted = end_of(pod_with(phase="Failed", reason="Evicted", message="The node was low on resource: memory."))
    assert evicted is not None
    assert "(Evicted: The node was low on resource: memory.)" in evicted.reason
    left = end_of(pod_with(phase="Succeeded"))
    assert left is not None
    assert left.was_asked


def test_why_a_pod_is_not_ready() -> None:
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    assert reason_of_wait(pod_with(conditions=[scheduled])) == f"no node takes its pod: {message}"
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x"'}}
    assert reason_of_wait(pod_with(containerStatuses=[{"name": "worker", "state": waiting}])) == (
        'its container worker waits (ImagePullBackOff: Back-off pulling image "x")'
    )
    assert reason_of_wait(pod_with()) == "it is still loading"


def test_the_controller_reads_no_secret_of_the_chart(tmp_path: Path) -> None:
    documents = render(VALUES)
    template = find(documents, "Deployment", "chat-controller")["spec"]["template"]
    for text in template["metadata"]["annotations"].values():
        assert "tandem-token" not in yaml.safe_load(text)

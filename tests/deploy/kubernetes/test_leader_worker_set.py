"""The chart with `workers.kind: LeaderWorkerSet`, above all with instances of several pods."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from tandem.core.config import WorkerConfig
from tandem.core.config_file import apply_overrides, load_config
from tests.deploy.kubernetes.manifests import (
    CHART,
    Document,
    find,
    leader_address,
    overrides_of,
    pods_of_instance,
    render,
)

OF_ONE_POD, OF_TWO_PODS = (CHART / "ci" / name for name in ("gpu-values.yaml", "ranks-values.yaml"))
SETTINGS = "tandem.serve/settings"


def mistakes_of_set(lws: Document) -> list[str]:
    """What LeaderWorkerSet 0.9 refuses beyond the schema (`leaderworkerset_webhook.go`), or could not do."""
    name, spec = lws["metadata"]["name"], lws["spec"]
    rollout = spec["rolloutStrategy"]["rollingUpdateConfiguration"]
    mistakes = []
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        mistakes.append(f"the name {name} is not one of DNS-1035, as its Service needs")
    if rollout["maxSurge"] == rollout["maxUnavailable"] == 0:
        mistakes.append("maxUnavailable must not be 0 when maxSurge is 0")
    pods = pods_of_instance(lws)
    if len(pods) > 1 and spec.get("startupPolicy") == "LeaderReady":
        mistakes.append("a leader that waits for the other pods is never Ready before they are made")
    for pod in pods:
        if pod["spec"].get("restartPolicy", "Always") != "Always":
            mistakes.append("pods of a StatefulSet restart always")
        variables = {each["name"] for container in pod["spec"]["containers"] for each in container.get("env", [])}
        mistakes += [f"the operator sets {each}" for each in sorted(variables) if each.startswith("LWS_")]
    return mistakes


@pytest.mark.parametrize("values", [OF_ONE_POD, OF_TWO_PODS], ids=lambda path: path.name)
def test_leader_worker_set_takes_its_objects(values: Path) -> None:
    sets = [document for document in render(values) if document["kind"] == "LeaderWorkerSet"]
    assert len(sets) == 3
    assert [mistake for document in sets for mistake in mistakes_of_set(document)] == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda lws: lws["metadata"].update(name="7b"), "the name 7b"),
        (lambda lws: lws["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"].update(maxUnavailable=0), "must not"),
        (lambda lws: lws["spec"].update(startupPolicy="LeaderReady"), "never Ready before they are made"),
        (lambda lws: pods_of_instance(lws)[1]["spec"].update(restartPolicy="Never"), "restart always"),
        (
            lambda lws: pods_of_instance(lws)[0]["spec"]["containers"][0]["env"].append({"name": "LWS_GROUP_SIZE"}),
            "the operator sets LWS_GROUP_SIZE",
        ),
    ],
)
def test_the_rules_find_mistakes(change: Callable[[Document], None], sentence: str) -> None:
    """Else the test above would show nothing."""
    document = deepcopy(find(render(OF_TWO_PODS), "LeaderWorkerSet", "chat-decode"))
    change(document)
    (mistake,) = mistakes_of_set(document)
    assert sentence in mistake


@pytest.mark.parametrize("name", ["chat-decode", "chat-uneven"])
def test_pods_of_an_instance_find_each_other(name: str, tmp_path: Path) -> None:
    lws = find(render(OF_TWO_PODS), "LeaderWorkerSet", name)
    leader = leader_address(lws, 0)
    path, graces, configs = tmp_path / "settings.yaml", list[float](), list[WorkerConfig]()
    pods = pods_of_instance(lws)
    for number, template in enumerate(pods):
        path.write_text(template["metadata"]["annotations"][SETTINGS])
        (container,) = template["spec"]["containers"]
        variables = {"LWS_LEADER_ADDRESS": leader} | ({} if number else {"POD_IP": "10.0.0.7"})
        configs.append(apply_overrides(load_config(path, WorkerConfig), overrides_of(container, variables)))
        graces.append(float(container["args"][container["args"].index("--grace") + 1]))
        assert container["args"][0] == container["name"] == ("ranks" if number else "worker")
        assert {"startupProbe", "readinessProbe", "livenessProbe", "ports"} & container.keys() == (
            set() if number else {"startupProbe", "readinessProbe", "livenessProbe", "ports"}
        )
    rank_0, *others = configs
    assert rank_0.ranks is not None
    assert rank_0.listen == "10.0.0.7:8003"
    assert rank_0.ranks.listen == "10.0.0.7:8004"
    assert len(rank_0.ranks.per_host) == len(pods)
    for other in others:
        assert other.ranks is not None
        assert other.ranks.listen == f"{leader}:8004"
        same = {"listen": rank_0.listen, "ranks": rank_0.ranks}
        assert other.model_copy(update=same) == rank_0
    gpus = [pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for pod in pods]
    assert gpus == list(rank_0.ranks.per_host)
    assert min(graces[1:]) > graces[0], "rank 0 ends the others"


def test_threads_are_the_cores_of_all_pods() -> None:
    """As many for each rank as its pod has cores for it."""
    group = {"name": "a", "role": "colocated", "ranksPerPod": [1, 2, 2], "instance": {"engine": {"tp": 5}}}
    group["resources"] = {"requests": {"cpu": "7"}}
    documents = render(None, 'workers.kind="LeaderWorkerSet"', f"workers.groups={json.dumps([group])}")
    template, _ = pods_of_instance(find(documents, "LeaderWorkerSet", "r-tandem-a"))[:2]
    assert yaml.safe_load(template["metadata"]["annotations"][SETTINGS])["instance"]["engine"]["threads"] == 15


def test_only_pods_of_its_group_reach_rank_0() -> None:
    documents = render(OF_TWO_PODS)
    sets = {group: find(documents, "LeaderWorkerSet", f"chat-{group}") for group in ("prefill", "decode")}
    prefill, decode = (pods_of_instance(sets[group]) for group in ("prefill", "decode"))
    router = find(documents, "Deployment", "chat-router")["spec"]["template"]
    assert reaches(documents, decode[1], decode[0], 8004)
    assert not reaches(documents, prefill[1], decode[0], 8004)
    assert not reaches(documents, router, decode[0], 8004)
    for port in (8003, 32768, 60999):  # calls between instances, and ports that the system chooses
        assert reaches(documents, prefill[0], decode[0], port)
        assert reaches(documents, decode[1], prefill[1], port)
    assert reaches(documents, router, decode[0], 8003)
    assert not reaches(documents, router, decode[0], 40000)


def reaches(documents: tuple[Document, ...], source: Document, target: Document, port: int) -> bool:
    """Whether the NetworkPolicies let a pod connect to a port of another one."""

    def selects(selector: Document, pod: Document) -> bool:
        return bool(selector["matchLabels"].items() <= pod["metadata"]["labels"].items())

    def is_port(allowed: Document) -> bool:
        if allowed.get("protocol", "TCP") != "TCP":
            return False
        if isinstance(allowed["port"], str):
            return (allowed["port"], port) in names
        return bool(allowed["port"] <= port <= allowed.get("endPort", allowed["port"]))

    ports = (each for container in target["spec"]["containers"] for each in container.get("ports", ()))
    names = {(each["name"], each["containerPort"]) for each in ports}
    policies = [each["spec"] for each in documents if each["kind"] == "NetworkPolicy"]
    rules = [rule for policy in policies if selects(policy["podSelector"], target) for rule in policy["ingress"]]
    return any(
        any(selects(peer["podSelector"], source) for peer in rule["from"])
        and ("ports" not in rule or any(map(is_port, rule["ports"])))
        for rule in rules
    )

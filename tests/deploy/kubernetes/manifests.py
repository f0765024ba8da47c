"""Renders the chart with Helm, and holds documents against the strict schema of their kind."""

import gzip
import json
import re
import subprocess
import zipfile
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema_rs import Draft7Validator, Registry

ROOT = Path(__file__).parents[3]
CHART = ROOT / "deploy" / "kubernetes" / "chart"
KUBERNETES_VERSIONS = ("1.31", "1.34", "1.37")
RELEASE, NAMESPACE = "r", "inference"
_TOOLS = ROOT / "build" / "tools"
HELM = _TOOLS / "helm"
_CRDS = Path(__file__).parent / "schemas"

Document = dict[str, Any]


def require_helm() -> None:
    """Skip the test if `make check-deploy` has not fetched Helm."""
    if not HELM.exists():
        pytest.skip("build/tools/helm is missing: run make check-deploy")


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    require_helm()
    return subprocess.run([HELM, *arguments], capture_output=True, text=True, check=False, timeout=60)


def try_render(*arguments: str | Path, version: str = KUBERNETES_VERSIONS[-1]) -> subprocess.CompletedProcess[str]:
    return helm("template", RELEASE, CHART, "--namespace", NAMESPACE, "--kube-version", version, *arguments)


@cache
def render(values: Path | None = None, *settings: str, version: str = KUBERNETES_VERSIONS[-1]) -> tuple[Document, ...]:
    """All documents of the chart. `settings` have the form of --set-json."""
    arguments = [
        *(["--values", values] if values else []),
        *(part for each in settings for part in ("--set-json", each)),
    ]
    ended = try_render(*arguments, version=version)
    assert ended.returncode == 0, ended.stderr
    return tuple(document for document in yaml.load_all(ended.stdout, yaml.CSafeLoader) if document is not None)


def find(documents: tuple[Document, ...], kind: str, name: str) -> Document:
    (found,) = (each for each in documents if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def pod_templates(documents: tuple[Document, ...]) -> Iterator[Document]:
    """The pod template of each document that has one; a Pod itself too."""
    for document in documents:
        match document:
            case {"kind": "Pod"}:
                yield document
            case {"kind": "Deployment", "spec": {"template": template}}:
                yield template
            case {"kind": "RayCluster", "spec": spec}:
                yield from (group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]))
            case {"kind": "LeaderWorkerSet"}:
                yield from pods_of_instance(document)[:2]  # the others are as the second one


def pods_of_instance(lws: Document) -> list[Document]:
    """The pod templates of one of the groups of pods that a LeaderWorkerSet makes, the leader's first."""
    template = lws["spec"]["leaderWorkerTemplate"]
    worker = template["workerTemplate"]
    return [template.get("leaderTemplate", worker), *[worker] * (template["size"] - 1)]


def leader_address(lws: Document, group: int) -> str:
    """What LeaderWorkerSet puts into LWS_LEADER_ADDRESS in the pods of a group."""
    name = lws["metadata"]["name"]
    return f"{name}-{group}.{name}.{NAMESPACE}"


def overrides_of(container: Document, variables: dict[str, str]) -> list[str]:
    """Of its arguments, what follows each --set, with Kubernetes' references to variables replaced."""
    arguments = expanded(container["args"], variables)
    return [value for option, value in pairwise(arguments) if option == "--set"]


def expanded(arguments: list[str], variables: dict[str, str]) -> list[str]:
    """Raises KeyError for a variable that the container does not have: Kubernetes would leave the reference there."""
    return [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], each) for each in arguments]


def mistakes_of(document: Document, version: str) -> list[str]:
    """How the document breaks the strict schema of its kind; a field that the kind does not have is a mistake."""
    errors = _validator(document["apiVersion"], document["kind"], version).iter_errors(document)
    name = f"{document['kind']} {document['metadata']['name']}"
    return [f"{name} {'.'.join(map(str, error.instance_path))}: {error.message[:300]}" for error in errors]


def kuberay_mistakes(cluster: Document) -> list[str]:
    """What the operator refuses beyond the schema: KubeRay 1.7, `utils/validation.go` and `common/pod.go`, as far as
    the chart may get there."""
    name, spec = cluster["metadata"]["name"], cluster["spec"]
    groups = spec.get("workerGroupSpecs", [])
    mistakes = []
    if len(name) > 53 or not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        mistakes.append(f"the name {name} is not one of 53 characters at most, of DNS-1035")
    if "authOptions" in spec and "rayVersion" not in spec:
        mistakes.append("a token needs rayVersion")
    if spec.get("upgradeStrategy", {}).get("type", "None") not in ("Recreate", "None"):
        mistakes.append("upgradeStrategy of a RayCluster is Recreate or None")
    for group in (spec["headGroupSpec"], *groups):
        mistakes += _mistakes_of_group(group)
    for group in groups:
        if not re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", group["groupName"]):
            mistakes.append(f"groupName {group['groupName']} is not one of DNS-1123")
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if least is None or most is None or not 0 <= least <= group["replicas"] <= most:
            mistakes.append("without autoscaling, minReplicas <= replicas <= maxReplicas are needed")
    names = [group["groupName"] for group in groups]
    if len(set(names)) < len(names):
        mistakes.append("two groups have one name")
    return mistakes


def _mistakes_of_group(group: Document) -> list[str]:
    mistakes = []
    containers = group["template"]["spec"].get("containers", [])
    if not containers:
        mistakes.append("a group has no container")
    if not all(isinstance(value, str) for value in group["rayStartParams"].values()):
        mistakes.append("values of rayStartParams are strings")
    if {"labels", "redis-password"} & set(group["rayStartParams"]):
        mistakes.append("rayStartParams has what has a field of its own")
    forbidden = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "RAY_enable_autoscaler_v2", "RAY_ADDRESS", "RAY_PORT"}
    variables = {each["name"] for container in containers for each in container.get("env", [])}
    mistakes += [f"the operator sets {each}" for each in sorted(forbidden & variables)]
    if any(mount["mountPath"] == "/dev/shm" for each in containers for mount in each.get("volumeMounts", [])):
        mistakes.append("the operator mounts /dev/shm")
    return mistakes


@cache
def _validator(api_version: str, kind: str, version: str) -> Draft7Validator:
    group, _, number = api_version.rpartition("/")
    crd = _CRDS / f"{group}_{number}_{kind}.json.gz"
    if crd.exists():
        schema = json.loads(gzip.decompress(crd.read_bytes()))["openAPIV3Schema"]
        _make_strict(schema)
        schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
        return Draft7Validator(schema)
    group = group.partition(".")[0]
    name = "-".join(filter(None, (kind.lower(), group, number)))
    return Draft7Validator(_read_schema(version, name), registry=_definitions(version))


@cache
def _definitions(version: str) -> Registry:
    return Registry([("json-schema:///_definitions.json", _read_schema(version, "_definitions"))])


def _read_schema(version: str, name: str) -> Any:
    folder = f"kubernetes_validate/kubernetes-json-schema/v{version}.0-local-strict"
    return json.loads(_archive().read(f"{folder}/{name}.json"))


@cache
def _archive() -> zipfile.ZipFile:
    return zipfile.ZipFile(_TOOLS / "kubernetes-schemas.zip")


def _make_strict(schema: Any) -> None:
    """Turn a CRD's schema into a JSON schema that allows no other fields."""
    if isinstance(schema, list):
        for item in schema:
            _make_strict(item)
    if not isinstance(schema, dict):
        return
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "(?i)" in str(schema.get("pattern")):
        del schema["pattern"]  # Go's flags are not JSON schema's
    keeps_others = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(schema.get("properties"), dict) and "type" in schema and not keeps_others:
        schema.setdefault("additionalProperties", False)
    for value in list(schema.values()):
        _make_strict(value)

"""Renders the chart with Helm, and holds documents against the strict schema of their kind."""

import gzip
import json
import subprocess
import zipfile
from collections.abc import Iterator
from functools import cache
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
            case {"kind": "LeaderWorkerSet", "spec": {"leaderWorkerTemplate": {"workerTemplate": template}}}:
                yield template


def mistakes_of(document: Document, version: str) -> list[str]:
    """How the document breaks the strict schema of its kind; a field that the kind does not have is a mistake."""
    errors = _validator(document["apiVersion"], document["kind"], version).iter_errors(document)
    name = f"{document['kind']} {document['metadata']['name']}"
    return [f"{name} {'.'.join(map(str, error.instance_path))}: {error.message[:300]}" for error in errors]


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

"""The Dockerfile, without a container runtime: its words, and its commands in folders of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.kubernetes.manifests import ROOT, pod_templates, render

DOCKERFILE = (ROOT / "Dockerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text().split()


def stage(name: str) -> str:
    (found,) = re.findall(rf"(?ms)^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", DOCKERFILE)
    return str(found).replace("\\\n", " ")


def test_the_image_has_what_the_chart_expects() -> None:
    for template in pod_templates(render()):
        security = template["spec"]["securityContext"]
        assert f"USER {security['runAsUser']}:{security['runAsGroup']}\n" in DOCKERFILE
        for container in template["spec"]["containers"]:
            ports = {port["containerPort"] for port in container.get("ports", [])}
            (exposed,) = re.findall(r"(?m)^EXPOSE (.*)$", DOCKERFILE)
            assert ports <= set(map(int, exposed.split()))
    assert 'ENTRYPOINT ["tandem"]' in DOCKERFILE
    assert DOCKERFILE.count("USER root") == 1
    assert DOCKERFILE.rstrip().endswith("USER 10001:10001")


def test_the_context_has_all_packages() -> None:
    packages = {path.name for path in (ROOT / "tandem").iterdir() if path.is_symlink()}
    kept = {line.removeprefix("!") for line in IGNORED if line.startswith("!")}
    assert kept == packages | {"tandem", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # most of it is for torch, on a slow network
def test_its_commands_make_a_tandem_that_runs(tmp_path: Path) -> None:
    """Everything but the base image: folders of the image are below `tmp_path`."""
    source, target = tmp_path / "src", tmp_path / "opt" / "tandem"
    source.mkdir()
    for line in IGNORED:
        if line.startswith("!"):
            path = ROOT / line.removeprefix("!")
            if path.is_dir():
                shutil.copytree(path, source / path.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, source)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SOURCE_DATE_EPOCH": "0"}
    for command in re.findall(r"(?m)^RUN (.*)$", stage("packages")):
        moved = command.replace("/opt/tandem", str(target)).replace("/tmp/wheel", str(tmp_path / "wheel"))
        ended = subprocess.run(
            ["bash", "-ec", moved], cwd=source, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, f"{moved}\n{ended.stdout}{ended.stderr}"
    assert not (target / "bin" / "pip").exists()
    model = (target / "models" / "tiny-python" / "config.json").resolve(strict=True)
    assert model.is_relative_to(target), "the folder of the sources is not in the image"
    for command in ("tandem version", "tandem worker --help", "tandem router --help", "hf download --help"):
        name, *arguments = command.split()
        command_line = [target / "bin" / name, *arguments]
        ended = subprocess.run(command_line, cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert ended.returncode == 0, ended.stderr

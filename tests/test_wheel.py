"""The wheel: what it holds, and that it runs from any folder, whatever packages that folder has of its own."""

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.cli.served import run_python, serving

pytestmark = pytest.mark.unmeasured
ROOT = Path(__file__).parents[1]
LINKS = [path for path in (ROOT / "tandem").iterdir() if path.is_symlink()]
DATA = (
    "py.typed",
    "deploy/kubernetes/chart/**/*",
    "deploy/kubernetes/chart/.helmignore",
    "deploy/monitoring/dashboards/*.json",
    "deploy/monitoring/rules.yaml",
    "engine/native/*.cpp",
    "engine/native/*.h",
    "models/tiny-python/*",
    "placement/data/*",
    "placement/report/*.html",
    "router/ui/static/*",
    "v1/*.pyi",
)


def _run(*arguments: str | Path, cwd: Path) -> None:
    ended = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def _pip(*arguments: str | Path, cwd: Path) -> None:
    _run(sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--disable-pip-version-check", cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a folder in the sources, from which a later wheel would take old files."""
    sources, output = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    without_caches = shutil.ignore_patterns("__pycache__")
    for name in ("tandem", *(link.name for link in LINKS)):
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=without_caches)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    _pip("wheel", "--no-build-isolation", "--wheel-dir", output, ".", cwd=sources)
    (built,) = output.glob("tandem_serve-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    _pip("install", "--target", target, wheel, cwd=target)
    return target


@pytest.fixture(scope="module")
def other_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with packages of the names that our folders have."""
    folder = tmp_path_factory.mktemp("project")
    for link in LINKS:
        (folder / link.name).mkdir()
        (folder / link.name / "__init__.py").write_text(f"raise RuntimeError('this is {link.name} of another project')")
    return folder


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.partition("/")[0] for name in names} == {"tandem", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    package = ROOT / "tandem"
    folders = [package, package / "v1", *LINKS]
    wanted = {path for folder in folders for path in folder.glob("*.py" if folder == package else "**/*.py")}
    for pattern in DATA:
        matching = [path for path in package.glob(pattern) if path.is_file()]
        assert matching, pattern
        wanted.update(matching)
    assert {str(path.relative_to(ROOT)) for path in wanted} == {name for name in names if name.startswith("tandem/")}


@pytest.mark.parametrize(
    "arguments",
    [
        ["tandem.cli.main", "--help"],
        ["tandem.cli.main", "version"],
        ["tandem.cli.main", "plan", "--devices"],
        ["tandem.router", "--help"],
        ["tandem.prefill_worker", "--help"],
        ["tandem.decode_worker", "--help"],
    ],
    ids=" ".join,
)
def test_it_runs_beside_packages_of_the_same_names(arguments: list[str], installed: Path, other_project: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    code = f"""\
import pathlib, runpy, sys
sys.argv = {arguments!r}
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    files = [module.__file__ for name, module in sys.modules.items() if name.startswith("tandem") and module.__file__]
    outside = [file for file in files if not pathlib.Path(file).is_relative_to({str(installed)!r})]
    assert files and not outside, outside
"""
    ended = run_python(["-c", code], environment, cwd=other_project)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout


@pytest.mark.timeout(240)
def test_it_serves_beside_packages_of_the_same_names(installed: Path, other_project: Path) -> None:
    small = [f"--set={role}.engine.kv_memory=8MiB" for role in ("prefill", "decode")]
    with (
        tempfile.TemporaryDirectory(prefix="t") as folder,
        serving(Path(folder), *small, package=installed, cwd=other_project) as served,
    ):
        chat = served.tandem("chat", "--complete", "--max-tokens", "4", stdin="def read_json(path):\n")
        assert chat.returncode == 0, chat.stderr
        assert chat.stdout.strip()
        for path in ("ui", "ui/main.js", "ui/state"):
            with urllib.request.urlopen(f"http://{served.http}/{path}", timeout=20) as response:
                assert response.status == 200


def test_every_library_that_the_product_imports_is_declared() -> None:
    declared = _declared()
    distributions = importlib.metadata.packages_distributions()
    missing = set()
    for link in LINKS:
        for path in link.glob("**/*.py"):
            if link.name == "models":  # tools that made the built-in model, for which `dev` is installed
                continue
            for name in _imported(path):
                if name in sys.stdlib_module_names or name in ("tandem", "bench"):
                    continue
                if not declared & {_normal(distribution) for distribution in distributions.get(name, [name])}:
                    missing.add((name, str(path.relative_to(ROOT))))
    assert not missing


def _imported(path: Path) -> set[str]:
    """Top-level names of all modules that the file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module.partition(".")[0])
    return names


def _declared() -> set[str]:
    """Distributions that some extra of users has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name != "dev"]
    return {_normal(Requirement(line).name) for lines in [project["dependencies"], *extras] for line in lines}


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")

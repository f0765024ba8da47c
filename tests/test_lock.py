"""The lock file has what is tested, with hashes."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ \\;\n]+)", re.MULTILINE)


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    """Name -> version."""
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)
    return {canonicalize_name(name): version for name, version in _PIN.findall(text)}


def test_it_has_the_versions_that_are_tested(locked: dict[str, str]) -> None:
    tested = {
        canonicalize_name(name): version for name, version in _PIN.findall((ROOT / "constraints.txt").read_text())
    }
    differ = {
        name: (locked[name], tested[name]) for name in locked.keys() & tested.keys() if locked[name] != tested[name]
    }
    assert not differ, "run make lock"


def test_it_has_everything_that_is_required(locked: dict[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in (*project["dependencies"], *(line for lines in extras.values() for line in lines)):
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) == "tandem-serve":
            continue
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not locked: run make lock"
        assert requirement.specifier.contains(Version(version), prereleases=True), line

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tandem.core.owned_folder import OwnedFolder

MAKE = """
import time
from tandem.core.owned_folder import OwnedFolder
folder = OwnedFolder.make("{kind}")
(folder.path / "file").write_text("content")
print(folder.path, flush=True)
time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where folders are made, also by processes that the test starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    return tmp_path


def make_in_process(kind: str) -> tuple["subprocess.Popen[str]", Path]:
    process = subprocess.Popen([sys.executable, "-c", MAKE.format(kind=kind)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    assert path.is_dir()
    return process, path


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate(timeout=10)


def age(path: Path) -> None:
    hour_ago_s = time.time() - 3600
    os.utime(path, (hour_ago_s, hour_ago_s))


def test_the_next_process_removes_what_a_killed_one_has_left(temporary: Path) -> None:
    killed, left = make_in_process("one")
    alive, used = make_in_process("one")
    kill(killed)
    for path in (left, used):
        age(path)
    other = OwnedFolder.make("two")
    assert left.exists(), "of another kind"
    own = OwnedFolder.make("one")
    assert not left.exists()
    assert (used / "file").exists()
    kill(alive)
    own.remove()
    other.remove()
    assert list(temporary.iterdir()) == [used]


def test_a_young_folder_and_a_link_stay(temporary: Path) -> None:
    """The process of a young folder may be about to lock it."""
    young = temporary / "tandem-one-young"
    young.mkdir()
    target = temporary / "target"
    target.mkdir()
    link = temporary / "tandem-one-link"
    link.symlink_to(target)
    age(target)
    OwnedFolder.make("one").remove()
    assert young.exists()
    assert target.exists()

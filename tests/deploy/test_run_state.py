import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tandem.core.errors import ConfigError
from tandem.deploy.run_state import RunState, StateFolders, process_started_s


@pytest.fixture
def folders(tmp_path: Path) -> StateFolders:
    folders = StateFolders.of_environment({"TANDEM_STATE_DIR": str(tmp_path / "state")})
    folders.make()
    return folders


def own_state(tmp_path: Path) -> RunState:
    return RunState(
        pid=os.getpid(),
        process_started_s=process_started_s(os.getpid()),
        model="m",
        http="127.0.0.1:1",
        grpc="127.0.0.1:2",
        control="127.0.0.1:3",
        cluster_token="secret",
        log_folder=str(tmp_path / "logs"),
        ray_folder=str(tmp_path / "tandem-0"),
    )


def test_a_running_one_is_found_and_removed(folders: StateFolders, tmp_path: Path) -> None:
    state = own_state(tmp_path)
    folders.write(state)
    assert folders.running() == [state]
    (file,) = folders.state.glob("serve-*")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"colour": "red"}))
    assert folders.running() == [state], "a newer version has written it"
    folders.remove(state.pid)
    assert folders.running() == []


def test_the_token_is_for_its_owner_alone(folders: StateFolders, tmp_path: Path) -> None:
    folders.write(own_state(tmp_path))
    (file,) = folders.state.glob("serve-*")
    assert file.stat().st_mode & 0o777 == 0o600
    assert folders.state.stat().st_mode & 0o777 == 0o700


def test_a_full_disk_leaves_the_file_as_it_was(
    folders: StateFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state = own_state(tmp_path)
    folders.write(state)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"serve-\d+.json cannot be written \(No space left on device\)"):
        folders.write(replace(state, http="127.0.0.1:9"))
    assert folders.running() == [state]
    assert len(list(folders.state.iterdir())) == 2, "the file and the folder of logs"


def test_what_the_dead_left_is_cleared_away(folders: StateFolders, tmp_path: Path) -> None:
    """Its files, and processes that have files of its Ray open."""
    ray = tmp_path / "tandem-0"
    ray.mkdir()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with (ray / "agent.out").open("w") as log:
        agent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], stdout=log)
    state = replace(own_state(tmp_path), pid=process.pid, process_started_s=process_started_s(process.pid))
    folders.write(state)
    assert folders.running() == [state]
    assert folders.clear_ended() == []
    process.communicate()
    assert folders.clear_ended() == [state]
    assert folders.running() == []
    assert list(folders.state.glob("s*-*")) == []
    assert not ray.exists()
    assert not psutil.pid_exists(agent.pid)
    agent.wait()


def test_a_folder_that_is_none_of_ours_stays(folders: StateFolders, tmp_path: Path) -> None:
    """Whatever a state file says."""
    folders.write(replace(own_state(tmp_path), process_started_s=1.0, ray_folder=str(tmp_path)))
    assert len(folders.clear_ended()) == 1
    assert folders.state.exists()


def test_another_process_with_the_same_pid_is_not_it(folders: StateFolders, tmp_path: Path) -> None:
    folders.write(replace(own_state(tmp_path), process_started_s=1.0))
    assert folders.running() == []


def test_files_of_other_versions_are_passed_over(folders: StateFolders) -> None:
    (folders.state / "serve-1.json").write_text('{"pid": 1}')
    (folders.state / "serve-2.json").write_text("not json")
    assert folders.running() == []


def test_only_the_last_logs_are_kept(folders: StateFolders) -> None:
    for number in range(8):
        (folders.logs / f"2020010{number}-000000-1").mkdir()
    newest = folders.new_log_folder(5)
    left = sorted(path.name for path in folders.logs.iterdir())
    assert left == ["20200104-000000-1", "20200105-000000-1", "20200106-000000-1", "20200107-000000-1", newest.name]


def test_where_state_goes(tmp_path: Path) -> None:
    both = {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_STATE_HOME": "/var/me"}
    logs, clusters = Path("/var/me/tandem/logs"), Path("/var/me/tandem/clusters")
    assert StateFolders.of_environment(both) == StateFolders(tmp_path / "tandem", logs, clusters)
    gone = {"XDG_RUNTIME_DIR": str(tmp_path / "none"), "XDG_STATE_HOME": "/var/me"}
    assert StateFolders.of_environment(gone).state == Path("/var/me/tandem")


def test_a_relative_folder_starts_at_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = StateFolders.of_environment({"TANDEM_STATE_DIR": "state"})
    assert folders == StateFolders(tmp_path / "state", tmp_path / "state" / "logs", tmp_path / "state" / "clusters")


def test_a_user_without_a_home_folder_is_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert StateFolders.of_environment({"TANDEM_STATE_DIR": "/state"}).logs == Path("/state/logs")
    with pytest.raises(ConfigError, match="this user has no home folder; set TANDEM_STATE_DIR"):
        StateFolders.of_environment({})


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folders = StateFolders.of_environment({"TANDEM_STATE_DIR": str(tmp_path / "file" / "below")})
    with pytest.raises(ConfigError, match="set TANDEM_STATE_DIR to a folder where you may write"):
        folders.make()

"""The files of a running `tandem serve`, through which status, chat, scale and stop find it.

    $XDG_RUNTIME_DIR/tandem/serve-<pid>.json      removed at the end; holds the cluster token, so mode 0600
    $XDG_STATE_HOME/tandem/logs/<time>-<pid>/     one log file for each process; the last few runs are kept

`TANDEM_STATE_DIR` replaces both roots. Without XDG_RUNTIME_DIR the state file is under XDG_STATE_HOME
(~/.local/state).
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tandem.core.errors import ConfigError
from tandem.core.tls import ClusterTls
from tandem.deploy.child_process import kill_all, processes_that_use

_KEPT_LOG_FOLDERS = 5
RAY_FOLDER_PREFIX = "tandem-"


@dataclass(frozen=True, slots=True)
class RunState:
    """`process_started_s` distinguishes the process from a later one with the same pid. `expected_transport` is the
    transport that KV should use between its workers; None accepts any. `has_tls`: the ports `http` and `grpc` have TLS;
    `cluster_tls` has the settings of the control port's, as JSON values."""

    pid: int
    process_started_s: float
    model: str
    http: str
    grpc: str
    control: str
    cluster_token: str = field(repr=False)
    log_folder: str
    ray_folder: str
    expected_transport: str | None = None
    has_tls: bool = False
    cluster_tls: dict[str, str | None] | None = None

    @property
    def tls(self) -> ClusterTls | None:
        """Of its control port."""
        return None if self.cluster_tls is None else ClusterTls.model_validate(self.cluster_tls)

    @property
    def url(self) -> str:
        return f"{'https' if self.has_tls else 'http'}://{self.http}"


@dataclass(frozen=True, slots=True)
class StateFolders:
    state: Path
    logs: Path

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> "StateFolders":
        if chosen := environment.get("TANDEM_STATE_DIR"):
            return cls(Path(chosen), Path(chosen) / "logs")
        home = Path(environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tandem"
        runtime = environment.get("XDG_RUNTIME_DIR")
        state = Path(runtime) / "tandem" if runtime and os.access(runtime, os.W_OK) else home
        return cls(state, home / "logs")

    def make(self) -> None:
        """Create both folders, readable by this user only. Raises ConfigError."""
        for folder in (self.state, self.logs):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"cannot create {folder} ({error.strerror}); set TANDEM_STATE_DIR to a folder where you may write"
                ) from error

    def new_log_folder(self, pid: int) -> Path:
        """A folder for this run's logs. Deletes the folders of earlier runs, except the newest few."""
        earlier = sorted(path for path in self.logs.iterdir() if path.is_dir())
        for old in earlier[: -(_KEPT_LOG_FOLDERS - 1)]:
            shutil.rmtree(old, ignore_errors=True)
        folder = self.logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{pid}"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def write(self, run: RunState) -> None:
        _write_private(self._run_file(run.pid), asdict(run))

    def remove(self, pid: int) -> None:
        self._run_file(pid).unlink(missing_ok=True)
        self._scale_file(pid).unlink(missing_ok=True)

    def write_scale_request(self, pid: int, instances: Mapping[str, int]) -> None:
        """Request from the run `pid` this number of instances of each role."""
        _write_private(self._scale_file(pid), dict(instances))

    def take_scale_request(self, pid: int) -> dict[str, int]:
        """The last request to the run `pid`; empty if there is none that can be read."""
        try:
            requested = json.loads(self._scale_file(pid).read_text())
            return {role: int(number) for role, number in requested.items()}
        except (OSError, ValueError, AttributeError):
            return {}

    def _run_file(self, pid: int) -> Path:
        return self.state / f"serve-{pid}.json"

    def _scale_file(self, pid: int) -> Path:
        return self.state / f"scale-{pid}.json"

    def running(self) -> list[RunState]:
        """All runs whose process lives, newest first. Clears away what the others have left."""
        return self._look()[0]

    def clear_ended(self) -> list[RunState]:
        """End the processes and remove the files of runs whose `tandem serve` was killed. Returns these runs."""
        return self._look()[1]

    def _look(self) -> tuple[list[RunState], list[RunState]]:
        live, ended = [], []
        for path in self.state.glob("serve-*.json"):
            try:
                run = RunState(**json.loads(path.read_text()))
            except (OSError, ValueError, TypeError):
                continue  # of another version, or just deleted
            if is_alive(run):
                live.append(run)
            else:
                ended.append(run)
                ray_folder = Path(run.ray_folder)
                if ray_folder.name.startswith(RAY_FOLDER_PREFIX):  # whatever the file says, delete nothing else
                    kill_all(processes_that_use(ray_folder))
                    shutil.rmtree(ray_folder, ignore_errors=True)
                self.remove(run.pid)
        return sorted(live, key=lambda run: run.process_started_s, reverse=True), ended


def _write_private(path: Path, value: dict[str, Any]) -> None:
    """Only this user may read the file. It is replaced in one step, so a reader never sees a partial file."""
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(value, file)
    draft.replace(path)


def process_started_s(pid: int) -> float:
    return psutil.Process(pid).create_time()


def is_alive(run: RunState) -> bool:
    try:
        process = psutil.Process(run.pid)
        return process.create_time() == run.process_started_s and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False

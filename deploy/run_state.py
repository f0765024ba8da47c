"""The files of a running cluster, through which status, chat, scale and stop find it.

    $XDG_RUNTIME_DIR/tandem/serve-<pid>.json      of `tandem serve`, removed at the end; with the cluster token, so 0600
    $XDG_STATE_HOME/tandem/logs/<time>-<pid>/     one log file for each process; the last few runs are kept
    $XDG_STATE_HOME/tandem/clusters/NAME/         all of a cluster of `tandem up`: `deploy.cluster_folder`

`TANDEM_STATE_DIR` replaces both roots. Without XDG_RUNTIME_DIR the state file is under XDG_STATE_HOME
(~/.local/state).
"""

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import psutil

from tandem.core.address import split_address
from tandem.core.config import ServeConfig
from tandem.core.errors import ConfigError
from tandem.core.home_folder import home_folder
from tandem.core.router_section import RouterSection
from tandem.core.tls import ClusterTls
from tandem.deploy.child_process import kill_all, processes_that_use
from tandem.deploy.machine import this_machine
from tandem.deploy.private_file import make_private_folder, write_private

_KEPT_LOG_FOLDERS = 5
_REACH_S = 2.0
RAY_FOLDER_PREFIX = "tandem-"


@dataclass(frozen=True, slots=True)
class RunState:
    """The controller's process and its cluster. `process_started_s` distinguishes the process from a later one with the
    same pid. `expected_transport` is the transport that KV should use between its workers; None accepts any. `has_tls`:
    the ports `http` and `grpc` have TLS; `cluster_tls` has the settings of the control port's, as JSON values.
    `controller` is the controller's own address, `cluster` the name of a cluster of `tandem up`. `ray`: the address of
    the Ray cluster that its controller runs on, somewhere; then `pid` is 0. `is_here`: all its processes are on
    this host."""

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
    controller: str = ""
    cluster: str = ""
    ray: str = ""
    is_here: bool = True

    @property
    def tls(self) -> ClusterTls | None:
        """Of its control port."""
        return None if self.cluster_tls is None else ClusterTls.model_validate(self.cluster_tls)

    @property
    def url(self) -> str:
        return f"{'https' if self.has_tls else 'http'}://{self.http}"

    def with_addresses(self, router: RouterSection) -> "RunState":
        """After a change of the router's addresses."""
        return replace(self, http=router.http, grpc=router.grpc, control=router.control)


@dataclass(frozen=True, slots=True)
class StateFolders:
    """`clusters` has a folder for each cluster of `tandem up`, by its name."""

    state: Path
    logs: Path
    clusters: Path

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> "StateFolders":
        """Absolute, since a controller runs in another folder. Raises ConfigError if nothing says where."""
        if chosen := environment.get("TANDEM_STATE_DIR"):
            state = Path(chosen).absolute()
            return cls(state, state / "logs", state / "clusters")
        if chosen := environment.get("XDG_STATE_HOME"):
            home = Path(chosen).absolute() / "tandem"
        elif (user_home := home_folder()) is not None:
            home = user_home / ".local" / "state" / "tandem"
        else:
            raise ConfigError("this user has no home folder; set TANDEM_STATE_DIR to a folder where you may write")
        runtime = environment.get("XDG_RUNTIME_DIR")
        state = Path(runtime).absolute() / "tandem" if runtime and os.access(runtime, os.W_OK) else home
        return cls(state, home / "logs", home / "clusters")

    def make(self) -> None:
        """Create the folders of `tandem serve`, readable by this user only. Raises ConfigError."""
        for folder in (self.state, self.logs):
            make_private_folder(folder)

    def new_log_folder(self, pid: int) -> Path:
        """A folder for this run's logs. Deletes the folders of earlier runs, except the newest few."""
        earlier = sorted(path for path in self.logs.iterdir() if path.is_dir())
        for old in earlier[: -(_KEPT_LOG_FOLDERS - 1)]:
            shutil.rmtree(old, ignore_errors=True)
        folder = self.logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{pid}"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def write(self, run: RunState) -> None:
        write_private(self._run_file(run.pid), asdict(run))

    def remove(self, pid: int) -> None:
        self._run_file(pid).unlink(missing_ok=True)

    def _run_file(self, pid: int) -> Path:
        return self.state / f"serve-{pid}.json"

    def running(self) -> list[RunState]:
        """All clusters whose controller lives, newest first. Clears away what runs of `tandem serve` have left."""
        live = [run for run in self._clusters_with_controller() if is_alive(run)] + self._look()[0]
        return sorted(live, key=lambda run: run.process_started_s, reverse=True)

    def clear_ended(self) -> list[RunState]:
        """End the processes and remove the files of runs whose `tandem serve` was killed. Returns these runs."""
        return self._look()[1]

    def _look(self) -> tuple[list[RunState], list[RunState]]:
        live, ended = [], []
        for path in self.state.glob("serve-*.json"):
            try:
                run = read_run(path)
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
        return live, ended

    def _clusters_with_controller(self) -> Iterator[RunState]:
        for path in self.clusters.glob("*/run.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):  # of another version, or just deleted
                yield read_run(path)


def read_run(path: Path) -> RunState:
    """Raises OSError, ValueError or TypeError for a file that cannot be read, or lacks what this version needs."""
    written = json.loads(path.read_text())
    known = {each.name for each in fields(RunState)}
    return RunState(**{name: value for name, value in written.items() if name in known})


def process_started_s(pid: int) -> float:
    return psutil.Process(pid).create_time()


def is_alive(run: RunState) -> bool:
    if run.ray:
        try:
            socket.create_connection(split_address(run.controller), timeout=_REACH_S).close()
        except OSError:
            return False
        return True
    try:
        process = psutil.Process(run.pid)
        return process.create_time() == run.process_started_s and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def run_state(
    config: ServeConfig, log_folder: Path, *, ray_folder: str = "", controller: str = "", cluster: str = ""
) -> RunState:
    """Of a cluster that this process controls."""
    pid = os.getpid()
    return RunState(
        pid=pid,
        process_started_s=process_started_s(pid),
        model=config.served_name,
        http=config.router.http,
        grpc=config.router.grpc,
        control=config.router.control,
        cluster_token=config.cluster_token or "",
        log_folder=str(log_folder),
        ray_folder=ray_folder,
        expected_transport=_expected_transport(config),
        has_tls=config.router.tls is not None,
        cluster_tls=None if config.cluster_tls is None else config.cluster_tls.model_dump(mode="json"),
        controller=controller,
        cluster=cluster,
    )


def _expected_transport(config: ServeConfig) -> str | None:
    """The transport that KV should use on one host; None if it depends on the devices."""
    transports = {section.transport for section in config.decode}
    if len(transports) == 1 and "auto" not in transports:
        return transports.pop()
    on_cpu = {section.engine.device for _, section in config.kinds} == {"cpu"}
    return "shared_memory" if transports == {"auto"} and (on_cpu or not this_machine().gpus) else None

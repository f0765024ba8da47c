"""Ray: a private one on this machine, which listens on loopback only, with its own token and without a dashboard; or a
cluster that others have started."""

import logging
import os
import secrets
import shutil
import socket
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from tandem.core.address import split_address
from tandem.core.errors import ConfigError, UnavailableError
from tandem.core.home_folder import home_folder
from tandem.deploy.run_state import RAY_FOLDER_PREFIX

# deploy/topology.py divides the cores; Ray only counts processes, with this custom resource. `num_cpus` is the number
# of processes, because Ray starts that many Python processes in advance.
PROCESS_RESOURCE = "tandem_process"
_MAX_LOCAL_PROCESSES = 1000
_OBJECT_STORE_BYTES = 80 << 20  # close to the minimum of Ray; Tandem stores nothing there
_LOG_BYTES = 16 << 20  # of one log file of Ray
RUNNING = "auto"  # the Ray that this machine is part of
RAY_CLIENT = "ray://"
_REACH_S = 5.0


def local_ray_environment(token_path: Path) -> dict[str, str]:
    """Environment variables that make a local Ray private: its own token, no usage reports, all sockets on loopback.

    Ray has no argument for the loopback address. It uses loopback if the machine cannot be part of a cluster of several
    machines, which the variable named after Windows and macOS declares.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "AUTOSCALER_METRIC_PORT": "0",
        # Where every core is busy, the usual 30 and 60 s are too short. The second one would end the processes that Ray
        # starts in advance; `ray.init` waits for them, and would do so for ever (ray-project/ray#40131).
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_gcs_server_port_wait_time_s": "120",
        "RAY_worker_register_timeout_seconds": "600",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray's driver prints a paragraph when a process dies; the controller reports the event in one sentence.
        "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
        # It would end Ray's processes when the machine is short of memory, whoever uses it. Ours have their own bounds.
        "RAY_memory_monitor_refresh_ms": "0",
        # What a process that Ray has started inherits: by default a low priority (15), and to be the first that the
        # kernel ends when memory is short.
        "RAY_worker_niceness": "0",
        "RAY_worker_oom_score_adjustment": "0",
        "RAY_ROTATION_MAX_BYTES": str(_LOG_BYTES),
        "RAY_ROTATION_BACKUP_COUNT": "1",
    }


def new_ray_folder() -> Path:
    """A name. Not under the state folder: the paths of sockets in it must stay below 108 characters."""
    return Path(tempfile.gettempdir()) / f"{RAY_FOLDER_PREFIX}{secrets.token_hex(4)}"


class LocalRay:
    """A private Ray cluster on this machine, with its own temporary folder. At most one per process, and none after its
    end: Ray keeps its token for the life of the process, and may end the process when its servers have died."""

    def __init__(self, folder: Path) -> None:
        """`folder` does not exist yet."""
        self.folder = folder

    def start(self, processes: int, gpus: int) -> None:
        """Start Ray and, in advance, `processes` Python processes. Takes some seconds.

        Raises UnavailableError.
        """
        self.folder.mkdir(mode=0o700)
        ray_folder = self.folder / "r"  # Ray opens its own folder to every user of the machine
        token_path = self.folder / "token"
        descriptor = os.open(token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        os.environ.update(local_ray_environment(token_path))
        os.environ.pop("RAY_ADDRESS", None)
        ray = import_ray()
        try:
            ray.init(
                address="local",
                num_cpus=processes,
                num_gpus=gpus,
                resources={PROCESS_RESOURCE: _MAX_LOCAL_PROCESSES},
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                object_store_memory=_OBJECT_STORE_BYTES,
                _plasma_directory=str(self.folder),
                _temp_dir=str(ray_folder),
            )
        except Exception as error:  # Ray raises a bare Exception after a timeout
            self.stop()
            raise UnavailableError(f"Ray could not be started ({error})") from error

    def failure(self) -> str | None:
        """Why Ray no longer works, in words; None while its servers run."""
        node: Any = import_ray()._private.worker._global_node
        if dead := node.dead_processes():
            return f"its {dead[0][0]} died"
        for kind, process in node.live_processes():
            try:
                if psutil.Process(process.pid).status() == psutil.STATUS_STOPPED:
                    return f"its {kind} is stopped"
            except psutil.Error:
                return f"its {kind} died"
        return None

    def stop(self) -> None:
        """End all processes of this Ray and remove the folder. No effect if Ray does not run."""
        try:
            import_ray().shutdown()
        finally:  # also where Ray is not installed
            shutil.rmtree(self.folder, ignore_errors=True)


def join_ray(address: str, otherwise: str, namespace: str | None = None) -> ModuleType:
    """Ray, connected to the cluster at `address`: host:port of its head, `auto` for the cluster of this machine, or
    ray://host:port. `otherwise` says what a user can do where there is none.

    Raises ConfigError for what is no address, UnavailableError if the cluster cannot be joined. A TCP connection is
    tried first: Ray itself would try for a minute, and then end the process.
    """
    if address != RUNNING:
        try:
            host, port = split_address(address.removeprefix(RAY_CLIENT))
        except ConfigError as error:
            raise ConfigError(f"--ray {address}: give host:port of a Ray cluster's head, auto or local") from error
        try:
            socket.create_connection((host, port), timeout=_REACH_S).close()
        except OSError as error:
            reason = error.strerror or "no answer"
            raise UnavailableError(
                f"no Ray answers at {address} ({reason}); start one with `ray start --head`, or {otherwise}"
            ) from error
    home = home_folder()
    if (
        home is not None and (home / ".ray" / "auth_token").is_file()
    ):  # `ray start --head` looks there, and a driver does not
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    ray = import_ray()
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # Ray raises a bare Exception after a timeout
        reason = str(error).partition("\n")[0]
        advice = (
            "; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with its token" if "oken" in reason else ""
        )
        raise UnavailableError(f"the Ray cluster at {address} cannot be joined ({reason}){advice}") from error
    return ray


def import_ray() -> ModuleType:
    """Import Ray late: Ray reads its environment variables at import, and the import takes most of a second."""
    import ray
    import ray.util.scheduling_strategies

    return ray  # type: ignore[no-any-return]

"""A private Ray on this machine, which can be replaced while the processes that it has started go on.

It listens on loopback only, with its own token and without a dashboard. Ray places and starts processes; it is not
their parent (`deploy.hosted_process`), so their end, and Ray's, are two events.
"""

import asyncio
import logging
import os
import secrets
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from tandem.core.errors import UnavailableError
from tandem.deploy.child_process import adopt_orphans, kill_all, processes_that_use
from tandem.deploy.run_state import RAY_FOLDER_PREFIX

# deploy/topology.py divides the cores; Ray only counts processes, with this custom resource. `num_cpus` is the number
# of processes, because Ray starts that many Python processes in advance.
PROCESS_RESOURCE = "tandem_process"
_MAX_LOCAL_PROCESSES = 1000
_OBJECT_STORE_BYTES = 80 << 20  # close to the minimum of Ray; Tandem stores nothing there
_LOG_BYTES = 16 << 20  # of one log file of Ray


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
        "RAY_raylet_start_wait_time_s": "120",  # 30 is too short where every core is busy
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray's driver prints a paragraph when a process dies; the controller reports the event in one sentence.
        "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
        # It would end Ray's processes when the machine is short of memory, whoever uses it. Ours have their own bounds.
        "RAY_memory_monitor_refresh_ms": "0",
        # What a process that Ray has started inherits: by default the lowest priority but four, and to be the first
        # that the kernel ends when memory is short.
        "RAY_worker_niceness": "0",
        "RAY_worker_oom_score_adjustment": "0",
        "RAY_ROTATION_MAX_BYTES": str(_LOG_BYTES),
        "RAY_ROTATION_BACKUP_COUNT": "1",
    }


class LocalRay:
    """A private Ray cluster on this machine, with its own temporary folder. At most one per process.

    This process becomes the parent of what Ray starts, see `deploy.child_process`.
    """

    def __init__(self) -> None:
        # Not under the state folder: the paths of sockets must stay below 108 characters.
        self.folder = Path(tempfile.gettempdir()) / f"{RAY_FOLDER_PREFIX}{secrets.token_hex(4)}"
        self._processes = 0
        self._gpus = 0
        self._starts = 0
        # The kernel ends Ray's servers with the thread that started them: it lives as long as this object.
        self._thread = ThreadPoolExecutor(1, "ray")

    def start(self, processes: int, gpus: int) -> None:
        """Start Ray and, in advance, `processes` Python processes. Takes some seconds. Call it on the main thread.

        Raises UnavailableError.
        """
        self._processes, self._gpus = processes, gpus
        self.folder.mkdir(mode=0o700)
        token_path = self.folder / "token"  # one for all starts: Ray reads it once
        descriptor = os.open(token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        os.environ.update(local_ray_environment(token_path))
        os.environ.pop("RAY_ADDRESS", None)
        adopt_orphans()
        try:
            self._init()
        except UnavailableError:
            self.stop()
            raise

    async def restart(self) -> None:
        """End what is left of Ray, and start it anew. Raises UnavailableError."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._restart)

    def failure(self) -> str | None:
        """Why Ray no longer works, in words; None while its servers run."""
        node = getattr(import_ray()._private.worker, "_global_node", None)
        if node is None:
            return "it has ended"
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
        import_ray().shutdown()
        self._kill_rest()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _ray_folder(self) -> Path:
        return self.folder / f"r{self._starts}"  # Ray opens its own folder to every user of the machine

    def _restart(self) -> None:
        self._kill_rest()  # first: `shutdown` waits seconds for a server that does not answer
        import_ray().shutdown()
        shutil.rmtree(self._ray_folder, ignore_errors=True)
        self._init()

    def _init(self) -> None:
        self._starts += 1
        ray = import_ray()
        try:
            ray.init(
                address="local",
                num_cpus=self._processes,
                num_gpus=self._gpus,
                resources={PROCESS_RESOURCE: _MAX_LOCAL_PROCESSES},
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                object_store_memory=_OBJECT_STORE_BYTES,
                _plasma_directory=str(self.folder),
                _temp_dir=str(self._ray_folder),
            )
        except Exception as error:  # Ray raises a bare Exception after a timeout
            raise UnavailableError(f"Ray could not be started ({error})") from error

    def _kill_rest(self) -> None:
        """The processes of Ray's that `shutdown` does not end, or could not end."""
        kill_all(processes_that_use(self._ray_folder))


def import_ray() -> ModuleType:
    """Import Ray late: Ray reads its environment variables at import, and the import takes most of a second."""
    import ray
    import ray.util.scheduling_strategies

    return ray  # type: ignore[no-any-return]


def reserve(ray: ModuleType, bundle: dict[str, float]) -> Any:
    """A placement group of one bundle. Raises what Ray raises."""
    return ray.util.placement_group([bundle], strategy="STRICT_PACK")


def options_in(ray: ModuleType, group: Any, bundle: dict[str, float]) -> dict[str, Any]:
    """Options of a Ray task that runs in the placement group and has its devices."""
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    return {
        "num_cpus": 0,
        "num_gpus": bundle.get("GPU", 0),
        "resources": {PROCESS_RESOURCE: bundle[PROCESS_RESOURCE]},
        "max_retries": 0,
        "scheduling_strategy": strategy,
    }

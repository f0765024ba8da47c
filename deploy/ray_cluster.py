"""Ray places and starts processes, and reports when one has died. Tokens and KV never pass through Ray.

Each instance has one placement group, each rank one actor. Ray restarts no actor: the controller replaces an instance
as a whole. A local Ray listens on loopback only, with its own token and without a dashboard.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from tandem.core.errors import InternalError, TandemError, UnavailableError, error_from_code
from tandem.deploy.controller import ProcessInfo, RunningProcess
from tandem.deploy.process_host import ProcessHost, StartReport
from tandem.deploy.topology import ProcessSpec

# deploy/topology.py divides the cores; Ray only counts processes, with this custom resource. `num_cpus` is the number
# of processes, because Ray starts that many Python processes in advance.
PROCESS_RESOURCE = "tandem_process"
_MAX_LOCAL_PROCESSES = 1000
_OBJECT_STORE_BYTES = 80 << 20  # close to the minimum of Ray; Tandem stores nothing there
_PLACEMENT_TIMEOUT_S = 30.0
_STOP_MARGIN_S = 8.0  # longer than a process needs to close, so that it can end by itself


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
    }


class LocalRay:
    """A private Ray cluster on this machine, with its own temporary folder. At most one per process."""

    def __init__(self) -> None:
        # Not under the state folder: the paths of Ray's sockets must stay below 108 characters.
        self.folder = Path(tempfile.gettempdir()) / f"tandem-{secrets.token_hex(4)}"

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

    def stop(self) -> None:
        """End all processes of this Ray and remove the folder. No effect if Ray does not run."""
        ray = import_ray()
        ray.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


class RayLauncher:
    """Starts processes as Ray actors. Ray must have been started or joined."""

    def __init__(self, log_folder: Path) -> None:
        self._log_folder = log_folder
        self._ray = import_ray()

    async def launch(self, spec: ProcessSpec) -> RunningProcess:
        """Raises the application's error, or UnavailableError if Ray lacks resources or the process died."""
        ray = self._ray
        bundle = {PROCESS_RESOURCE: 1.0} | ({"GPU": spec.gpus} if spec.gpus else {})
        group = ray.util.placement_group([bundle], strategy="STRICT_PACK")
        log_path = str(self._log_folder / f"{spec.name}.log")
        actor = None
        try:
            try:
                async with asyncio.timeout(_PLACEMENT_TIMEOUT_S):
                    await group.ready()
            except TimeoutError as error:
                raise UnavailableError(f"Ray has no resources for {spec.name}, which needs {bundle}") from error
            actor = _actor_class(ray, group, bundle).remote()
            report: StartReport = await actor.start.remote(spec, log_path)
            if report.error_code:
                raise _start_error(report, log_path)
        except ray.exceptions.RayError as error:
            _release(ray, actor, group)
            reason = f"{spec.name} died while it started; its log is {log_path}"
            raise UnavailableError(reason) from error
        except BaseException:
            _release(ray, actor, group)
            raise
        info = ProcessInfo(spec.name, spec.role, report.pid, report.address, report.instance_id, log_path)
        return _RayProcess(ray, actor, group, info)


class _RayProcess:
    def __init__(self, ray: ModuleType, actor: Any, group: Any, info: ProcessInfo) -> None:
        self.info = info
        self._ray, self._actor, self._group = ray, actor, group

    async def wait_closed(self) -> str:
        try:
            reason: str = await self._actor.wait_closed.remote()
        except self._ray.exceptions.RayError:
            reason = "its process died"
        return f"{reason}; its log is {self.info.log_path}"

    async def stop(self, grace_s: float) -> None:
        with contextlib.suppress(TimeoutError, self._ray.exceptions.RayError):
            async with asyncio.timeout(grace_s + _STOP_MARGIN_S):
                await self._actor.stop.remote(grace_s)

    async def kill(self) -> None:
        _release(self._ray, self._actor, self._group)


def _actor_class(ray: ModuleType, group: Any, bundle: dict[str, float]) -> Any:
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    return ray.remote(ProcessHost).options(
        num_cpus=0,
        num_gpus=bundle.get("GPU", 0),
        resources={PROCESS_RESOURCE: bundle[PROCESS_RESOURCE]},
        max_restarts=0,
        max_task_retries=0,
        scheduling_strategy=strategy,
    )


def _release(ray: ModuleType, actor: Any, group: Any) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        if actor is not None:
            ray.kill(actor, no_restart=True)
        ray.util.remove_placement_group(group)


def _start_error(report: StartReport, log_path: str) -> TandemError:
    """The message of an internal error names the log; other messages need no log."""
    is_internal = report.error_code == InternalError.code
    message = f"{report.error_message}; its log is {log_path}" if is_internal else report.error_message
    return error_from_code(report.error_code, message)


def import_ray() -> ModuleType:
    """Import Ray late: Ray reads its environment variables at import, and the import takes most of a second."""
    import ray
    import ray.util.scheduling_strategies

    return ray  # type: ignore[no-any-return]

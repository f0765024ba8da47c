"""Ray as Tandem uses it: it places and starts processes, and says when one has died. No token and no KV goes
through it.

One placement group for each instance, one actor for each rank, never restarted by Ray: the controller replaces an
instance as a whole. A local Ray listens on loopback only, with a token of its own, without its dashboard.
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

# Cores are shared out by deploy/topology.py, so Ray counts places only. Of CPUs it is told as many as there will be
# processes, because that many Python processes it warms up while it starts.
PLACE = "tandem_process"
_LOCAL_PLACES = 1000
_OBJECT_STORE_BYTES = 80 << 20  # the least that Ray accepts, nearly: nothing of ours is stored there
_PLACEMENT_TIMEOUT_S = 30.0
_STOP_MARGIN_S = 8.0  # more than a process gives itself to close, so that it may end by itself


def local_ray_environment(token_path: Path) -> dict[str, str]:
    """Variables that make a local Ray private: its own token, no reports to anyone, every socket on loopback.

    Ray has no argument for the loopback address; it takes it when told that this machine cannot be part of a cluster
    of several, which is what the variable named after Windows and macOS means.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "AUTOSCALER_METRIC_PORT": "0",
        "RAY_raylet_start_wait_time_s": "120",  # 30 is too short where every core is busy
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray prints a paragraph at its driver whenever a process dies; the controller says it in a sentence.
        "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    }


class LocalRay:
    """A Ray of our own on this machine, in a temporary folder of its own. One for each process."""

    def __init__(self) -> None:
        # Not under the state folder: the paths of Ray's sockets must stay below 108 characters.
        self.folder = Path(tempfile.gettempdir()) / f"tandem-{secrets.token_hex(4)}"

    def start(self, processes: int, gpus: int) -> None:
        """Start it, with `processes` Python processes warmed up for what comes; takes some seconds.

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
                resources={PLACE: _LOCAL_PLACES},
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                object_store_memory=_OBJECT_STORE_BYTES,
                _plasma_directory=str(self.folder),
                _temp_dir=str(ray_folder),
            )
        except Exception as error:  # a bare Exception is what Ray raises when it takes too long
            self.stop()
            raise UnavailableError(f"Ray could not be started ({error})") from error

    def stop(self) -> None:
        """End every process that Ray started here and remove the folder. Does no harm when nothing runs."""
        ray = import_ray()
        ray.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


class RayLauncher:
    """Starts processes as Ray actors. Ray must have been started or joined."""

    def __init__(self, log_folder: Path) -> None:
        self._log_folder = log_folder
        self._ray = import_ray()

    async def launch(self, spec: ProcessSpec) -> RunningProcess:
        """Raises what the application raised, or UnavailableError if Ray has no room or the process died."""
        ray = self._ray
        bundle = {PLACE: 1.0} | ({"GPU": spec.gpus} if spec.gpus else {})
        group = ray.util.placement_group([bundle], strategy="STRICT_PACK")
        log_path = str(self._log_folder / f"{spec.name}.log")
        actor = None
        try:
            try:
                async with asyncio.timeout(_PLACEMENT_TIMEOUT_S):
                    await group.ready()
            except TimeoutError as error:
                raise UnavailableError(f"Ray has no room for {spec.name}, which needs {bundle}") from error
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
        resources={PLACE: bundle[PLACE]},
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
    """Faults of ours point to the log; what the user can mend says it all by itself."""
    is_ours = report.error_code == InternalError.code
    message = f"{report.error_message}; its log is {log_path}" if is_ours else report.error_message
    return error_from_code(report.error_code, message)


def import_ray() -> ModuleType:
    """Ray, imported late: it reads its variables then, and takes most of a second."""
    import ray
    import ray.util.scheduling_strategies

    return ray  # type: ignore[no-any-return]

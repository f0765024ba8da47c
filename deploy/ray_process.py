"""Ray's client in a process of its own: `python -m tandem.deploy.ray_process FOLDER GPUS CONTROLLER`.

Ray ends the process of its client when its servers have died, and a second Ray cannot be trusted in a process that has
had one. So `tandem serve` has this process beside it, and replaces it together with its Ray. They speak over the
standard streams, one JSON object a line:

    controller                                             this process
      | <--------------------------------- ready, or error -- |
      | -- key, bundle, command, environment, log_path -----> |   place it, start it there
      | <------------------------- key, pid, devices; error -- |
      | -- release: key ------------------------------------> |
      | <-------------------------------------------- failed -- |   Ray's servers have died, and this process ends
      | (end of the stream) --------------------------------> |   Ray is stopped
"""

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tandem.core.errors import UnavailableError
from tandem.core.parent_process import end_with_parent
from tandem.deploy.child_process import spawn
from tandem.deploy.ray_cluster import PROCESS_RESOURCE, LocalRay, import_ray

_ADOPTION_S = 10.0
_POLL_S = 0.25
_RAY_WORKERS = 2  # Python processes of Ray, which start ours; a start takes a moment


def command_of(folder: Path, gpus: int) -> list[str]:
    """The command of a child of this process."""
    module = ["-P", "-m", "tandem.deploy.ray_process"]
    return [sys.executable, *module, str(folder), str(gpus), str(os.getpid())]


class _Places:
    """What Ray holds for processes, by key."""

    def __init__(self) -> None:
        self._ray = import_ray()
        self._groups: dict[str, Any] = {}
        self._starting = asyncio.Semaphore(_RAY_WORKERS)  # for more at a time, Ray would start more processes

    async def spawn(
        self, key: str, bundle: dict[str, float], command: list[str], environment: dict[str, str], log_path: str
    ) -> dict[str, Any]:
        """Reserve the resources in `bundle`, and start `command` there; an empty command starts nothing."""
        ray = self._ray
        group = self._groups[key] = ray.util.placement_group([bundle], strategy="STRICT_PACK")
        await group.ready()
        in_group = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0
        )
        task = ray.remote(_spawn_with_devices).options(
            num_cpus=0,
            num_gpus=bundle.get("GPU", 0),
            resources={PROCESS_RESOURCE: bundle[PROCESS_RESOURCE]},
            max_retries=0,
            scheduling_strategy=in_group,
        )
        async with self._starting:
            pid, devices = await task.remote(command, environment, log_path)
        return {"pid": pid, "devices": devices}

    def release(self, key: str) -> None:
        group = self._groups.pop(key, None)
        if group is not None:
            self._ray.util.remove_placement_group(group)


def _spawn_with_devices(
    command: Sequence[str], environment: Mapping[str, str], log_path: str
) -> tuple[int, list[int | str]]:
    """In a Ray task: the pid, 0 without a command, and the devices that Ray has chosen."""
    return (spawn(command, environment, log_path) if command else 0), import_ray().get_gpu_ids()


async def _serve(ray: LocalRay, output: int) -> None:
    places, work = _Places(), set()

    async def answer(message: dict[str, Any]) -> None:
        try:
            result = await places.spawn(**message)
        except Exception as error:  # noqa: BLE001 - whatever Ray raises, the controller gets it and tries again
            first_line = str(error).strip().partition("\n")[0]
            result = {"error": f"{type(error).__name__}: {first_line}"}
        _say(output, key=message["key"], **result)

    failing = asyncio.create_task(_end_when_failed(ray, output))
    reader = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        message = json.loads(line)
        if "release" in message:
            places.release(message["release"])
            continue
        task = asyncio.create_task(answer(message))
        work.add(task)
        task.add_done_callback(work.discard)
    for task in (failing, *work):
        task.cancel()
    await asyncio.gather(failing, *work, return_exceptions=True)


async def _end_when_failed(ray: LocalRay, output: int) -> None:
    while (reason := ray.failure()) is None:  # noqa: ASYNC110 - Ray tells no event
        await asyncio.sleep(_POLL_S)
    _say(output, failed=reason)
    os._exit(1)


def _say(output: int, **fields: Any) -> None:
    os.write(output, json.dumps(fields).encode() + b"\n")


def main() -> int:
    folder, gpus, controller_pid = sys.argv[1:]
    if not end_with_parent(int(controller_pid), _ADOPTION_S):
        return 1
    output = os.dup(1)
    os.dup2(2, 1)  # what Ray prints goes to the log
    ray = LocalRay(Path(folder))
    try:
        ray.start(_RAY_WORKERS, int(gpus))
    except UnavailableError as error:
        _say(output, error=error.message)
        return 1
    try:
        _say(output, ready=True)
        asyncio.run(_serve(ray, output))
    finally:
        ray.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A kubelet whose containers are processes of this machine: each pod has an address of its own on loopback, runs the
arguments of its container with the settings of its annotation, and is Ready once its health service says so."""

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from tandem.wire.channels import open_channel
from tandem.wire.health import check_health
from tests.deploy.kubernetes.fake_api import FakeKubernetes
from tests.deploy.kubernetes.manifests import ROOT, Document

_LOOK_S = 0.2


class ProcessKubelet:
    """`places`: text of settings and arguments -> what stands for it here, such as the folder of a volume."""

    def __init__(self, folder: Path, places: dict[str, str]) -> None:
        self.kubernetes: FakeKubernetes | None = None
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self._folder = folder
        self._places = places
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    def created(self, pod: Document) -> None:
        task = asyncio.create_task(self._run(pod, f"127.0.3.{next(self._numbers)}"), name=pod["metadata"]["name"])
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def deleted(self, pod: Document, grace_s: int) -> None:
        assert self.kubernetes is not None
        name = pod["metadata"]["name"]
        if (process := self.processes.get(name)) is None:
            self.kubernetes.remove(name)
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        asyncio.get_running_loop().call_later(grace_s, self._kill, name)

    async def log(self, name: str, num_past: int, *, follow: bool) -> AsyncIterator[bytes]:
        assert not follow
        for line in (self._folder / f"{name}.log").read_bytes().splitlines(keepends=True)[-num_past:]:
            yield line

    async def close(self) -> None:
        for name in list(self.processes):
            self._kill(name)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def localized(self, text: str) -> str:
        for there, here in self._places.items():
            text = text.replace(there, here)
        return text

    async def _run(self, pod: Document, ip: str) -> None:
        assert self.kubernetes is not None
        name, (container,) = pod["metadata"]["name"], pod["spec"]["containers"]
        settings, log = self._folder / f"{name}.yaml", self._folder / f"{name}.log"
        settings.write_text(self.localized(pod["metadata"]["annotations"]["tandem.serve/settings"]))
        arguments = [each.replace("$(POD_IP)", ip) for each in container["args"]]
        arguments = [str(settings) if each.endswith("/settings.yaml") else each for each in arguments]
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tandem.cli.main",
                *arguments,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
            )
        self.processes[name] = process
        ready = asyncio.create_task(self._make_ready(name, ip))
        status = await process.wait()
        ready.cancel()
        del self.processes[name]
        pods = {each["metadata"]["name"]: each for each in self.kubernetes.pods().values()}
        if "deletionTimestamp" in pods[name]["metadata"]:
            self.kubernetes.remove(name)
        else:
            self.kubernetes.end_container(name, status, log.read_text(errors="replace")[-2000:])

    async def _make_ready(self, name: str, ip: str) -> None:
        assert self.kubernetes is not None
        async with open_channel(f"{ip}:8003") as channel:
            while not await check_health(channel, 2.0):  # noqa: ASYNC110 - of another process
                await asyncio.sleep(_LOOK_S)
        self.kubernetes.make_ready(name, ip)

    def _kill(self, name: str) -> None:
        if (process := self.processes.get(name)) is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

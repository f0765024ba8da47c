"""Applications that a process host can run in a test, without torch and without a network."""

import asyncio
import os
import time
import uuid

from grpc_health.v1 import health_pb2

from tandem.core.config import WorkerConfig
from tandem.core.errors import CheckpointError
from tandem.wire.server import bind, build_server


class FakeApp:
    """Ready at once, ends when told to. The model's name makes it misbehave."""

    def __init__(self, config: WorkerConfig) -> None:
        self.address = "127.0.0.1:1"
        self.instance_id = uuid.uuid4().hex
        self._name = config.served_name
        self._closed = asyncio.Event()

    async def start(self) -> None:
        print(f"starting {self._name}", flush=True)
        match self._name:
            case "broken":
                raise CheckpointError("the checkpoint has no config.json")
            case "buggy":
                raise KeyError("a fault of ours")
            case "deadly":
                os._exit(3)
            case "slow":
                print(f"pid {os.getpid()}", flush=True)
                await asyncio.Event().wait()
        print(f"threads {os.environ['OMP_NUM_THREADS']}", flush=True)
        if self._name == "on-gpu":
            print(f"devices {os.environ['CUDA_VISIBLE_DEVICES']}", flush=True)

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def drain_and_stop(self, grace_s: float) -> None:
        print(f"draining for {grace_s}", flush=True)
        if self._name == "undying":
            time.sleep(1000)  # noqa: ASYNC251 - it hangs
        self._closed.set()


class HealthyApp(FakeApp):
    """With a health service on a port of its own. Named "hanging", its event loop stands still after a moment."""

    async def start(self) -> None:
        await super().start()
        self._server, health = build_server()
        self.address = bind(self._server, "127.0.0.1:0")
        await self._server.start()
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        if self._name == "hanging":
            asyncio.get_running_loop().call_later(0.5, time.sleep, 1000)
        elif self._name == "ill":
            await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)

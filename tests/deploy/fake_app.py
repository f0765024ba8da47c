"""Applications that a process host can run in a test, without torch and without a network."""

import asyncio
import uuid

from core.config import WorkerConfig
from core.errors import CheckpointError


class FakeApp:
    """Ready at once, ends when told to. The model's name makes it misbehave."""

    def __init__(self, config: WorkerConfig) -> None:
        self.address = "127.0.0.1:1"
        self.instance_id = uuid.uuid4().hex
        self._config = config
        self._closed = asyncio.Event()

    async def start(self) -> None:
        print(f"starting {self._config.served_name}")
        if self._config.served_name == "broken":
            raise CheckpointError("the checkpoint has no config.json")
        if self._config.served_name == "buggy":
            raise KeyError("a fault of ours")

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def drain_and_stop(self, grace_s: float) -> None:
        print(f"draining for {grace_s}")
        self._closed.set()

"""The engines that users would otherwise choose, each in two processes of an environment of its own."""

import asyncio
import json
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from tandem.profiling.errors import MeasurementError

ENGINES = ("mooncake", "nixl")
OPERATIONS = ("read", "write")

_SCRIPT = Path(__file__).with_name("engine_process.py")
_PREFIX = "engine:"  # of the lines that are ours; the engines print others
_TIMEOUT_S = 60.0


class TransferEngine:
    """A connected pair of processes."""

    def __init__(self, name: str, initiator: Process) -> None:
        self.name = name
        self._initiator = initiator

    async def transfer_s(self, operation: str, local: Sequence[int], remote: Sequence[int], length: int) -> float:
        """Seconds for all pieces, as the engine says. Raises MeasurementError."""
        job = {"operation": operation, "local": list(local), "remote": list(remote), "length": length}
        _write(self._initiator, json.dumps(job))
        return float(await _answer(self._initiator, self.name))


@asynccontextmanager
async def running(name: str, python: Path, pool_bytes: int) -> AsyncIterator[TransferEngine]:
    """`python` is an interpreter that has the engine. Raises MeasurementError."""
    target = await _start(name, "target", python, pool_bytes)
    initiator = None
    try:
        address = await _answer(target, name)
        initiator = await _start(name, "initiator", python, pool_bytes)
        _write(initiator, address)
        await _answer(initiator, name)
        yield TransferEngine(name, initiator)
    finally:
        for process in (initiator, target):
            if process is not None and process.returncode is None:
                process.kill()  # some engines do not end by themselves
                await process.wait()


async def _start(name: str, role: str, python: Path, pool_bytes: int) -> Process:
    command = (str(python), str(_SCRIPT), name, role, str(pool_bytes))
    return await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, limit=1 << 24)


def _write(process: Process, line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line.encode() + b"\n")


async def _answer(process: Process, name: str) -> str:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            async for line in process.stdout:
                if line.startswith(_PREFIX.encode()):
                    return line.decode().removeprefix(_PREFIX).strip()
    except TimeoutError as error:
        raise MeasurementError(f"{name} did not answer in {_TIMEOUT_S:g} s") from error
    raise MeasurementError(
        f"a process of {name} has ended; start bench/kv_transfer/engine_process.py by hand to see why"
    )

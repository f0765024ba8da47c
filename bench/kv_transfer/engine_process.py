"""One side of a transfer engine that users would otherwise choose. Runs in an environment that has the engine, and
imports nothing of Tandem: `python engine_process.py ENGINE ROLE POOL_BYTES`.

    target      registers its pool, prints how to reach it, and ends with its standard input
    initiator   reads that line, then transfers as each further line says, and prints the seconds that it took

A line of a transfer is JSON: {"operation": "read" or "write", "local": [...], "remote": [...], "length": bytes}, with
offsets in the two pools. The time begins before the engine is given the list, and ends when the engine says that all is
done.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class PeerEngine(Protocol):
    """One side of an engine, with a registered pool."""

    def describe(self) -> dict[str, Any]:
        """How the other side reaches this one, for JSON."""
        ...

    def connect(self, other: dict[str, Any]) -> None: ...

    def transfer(self, operation: str, local: Sequence[int], remote: Sequence[int], length: int) -> None:
        """Returns when the engine says that all pieces are there. Raises RuntimeError."""
        ...


MOONCAKE_BATCH = 1024  # pieces in one call; 4,096 end in "operation aborted"


class Mooncake:
    """mooncake-transfer-engine-non-cuda, over TCP."""

    def __init__(self, pool: Any) -> None:
        from mooncake.engine import TransferEngine  # type: ignore[import-not-found]

        self.pool, self.base = pool, pool.ctypes.data
        self.engine = TransferEngine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
            raise RuntimeError("mooncake could not be initialised")
        if self.engine.register_memory(self.base, pool.nbytes):
            raise RuntimeError("mooncake could not register the pool")

    def describe(self) -> dict[str, Any]:
        return {"target": f"127.0.0.1:{self.engine.get_rpc_port()}", "base": self.base}

    def connect(self, other: dict[str, Any]) -> None:
        self.target, self.remote_base = other["target"], other["base"]

    def transfer(self, operation: str, local: Sequence[int], remote: Sequence[int], length: int) -> None:
        call = getattr(self.engine, f"batch_transfer_sync_{operation}")
        ours = [self.base + offset for offset in local]
        theirs = [self.remote_base + offset for offset in remote]
        for begin in range(0, len(ours), MOONCAKE_BATCH):
            some = slice(begin, begin + MOONCAKE_BATCH)
            if call(self.target, ours[some], theirs[some], [length] * len(ours[some])):
                raise RuntimeError("a transfer of mooncake failed")


class Nixl:
    """nixl with UCX, which chooses the transport."""

    def __init__(self, pool: Any) -> None:
        import uuid

        from nixl._api import nixl_agent, nixl_agent_config  # type: ignore[import-not-found]

        self.pool, self.base = pool, pool.ctypes.data
        self.agent = nixl_agent(uuid.uuid4().hex, nixl_agent_config(backends=["UCX"]))
        self.registered = self.agent.register_memory([(self.base, pool.nbytes, 0, "")], "DRAM")

    def describe(self) -> dict[str, Any]:
        return {"metadata": self.agent.get_agent_metadata().hex(), "base": self.base}

    def connect(self, other: dict[str, Any]) -> None:
        name = self.agent.add_remote_agent(bytes.fromhex(other["metadata"]))
        self.remote_name, self.remote_base = name, other["base"]
        if isinstance(self.remote_name, bytes):
            self.remote_name = self.remote_name.decode()

    def transfer(self, operation: str, local: Sequence[int], remote: Sequence[int], length: int) -> None:
        ours = self.agent.get_xfer_descs([(self.base + offset, length, 0) for offset in local], "DRAM")
        theirs = self.agent.get_xfer_descs([(self.remote_base + offset, length, 0) for offset in remote], "DRAM")
        handle = self.agent.initialize_xfer(operation.upper(), ours, theirs, self.remote_name)
        state = self.agent.transfer(handle)
        while state not in ("DONE", "ERR"):
            state = self.agent.check_xfer_state(handle)
        self.agent.release_xfer_handle(handle)
        if state == "ERR":
            raise RuntimeError("a transfer of nixl failed")


ENGINES: dict[str, Any] = {"mooncake": Mooncake, "nixl": Nixl}


def main() -> None:
    engine_name, role, pool_bytes = sys.argv[1:]
    pool = np.empty(int(pool_bytes), dtype=np.uint8)
    pool[:] = 1 if role == "target" else 2  # touched: the first touch of a page is slow, and is no part of a transfer
    engine: PeerEngine = ENGINES[engine_name](pool)
    lines = open(0)  # noqa: SIM115 - standard input, to the end of the process
    output = sys.stdout
    if role == "target":
        print("engine:", json.dumps(engine.describe()), file=output, flush=True)
        lines.read()
        return
    engine.connect(json.loads(lines.readline()))
    print("engine: ready", file=output, flush=True)
    for line in lines:
        job = json.loads(line)
        started_s = time.perf_counter()
        engine.transfer(job["operation"], job["local"], job["remote"], job["length"])
        print("engine:", time.perf_counter() - started_s, file=output, flush=True)
        if job["operation"] == "read":
            expected = 1
            assert all(pool[offset + job["length"] - 1] == expected for offset in job["local"]), "bytes did not arrive"


if __name__ == "__main__":
    main()

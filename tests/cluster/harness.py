"""A whole cluster on loopback: real processes, real sockets, a real model; no Ray, which has its own tests."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import httpx
import yaml

from tandem.core.session import InstanceStatus, Role
from tandem.core.tls import ClusterTls
from tandem.wire.channels import open_channel
from tandem.wire.fleet import FleetDescription, describe_fleet

START_TIMEOUT_S = 180.0  # three imports of torch at once on a busy machine


_given_ports: set[int] = set()


def free_port() -> int:
    """Another one each time, outside the range from which the system takes ports of connections: one of those could
    take it meanwhile. The choice has no seed, since tests that run beside this one may have the same."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given_ports:
                _given_ports.add(port)
                return port


@dataclass
class Cluster:
    """Router and workers as `python -m` processes, each with its configuration and log in `folder`."""

    model: Path
    folder: Path
    prefill: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] = field(default_factory=dict)
    colocated: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    worker_module: str | None = None  # in the place of the roles' own
    cluster_tls: ClusterTls | None = None
    http_options: dict[str, Any] = field(default_factory=dict)  # of httpx
    TOKEN: ClassVar[str] = "test-token"

    def __post_init__(self) -> None:
        self.http_port, self.grpc_port, self.control_port = free_port(), free_port(), free_port()

    @property
    def url(self) -> str:
        return f"{'https' if 'tls' in self.router else 'http'}://127.0.0.1:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def control_address(self) -> str:
        return f"127.0.0.1:{self.control_port}"

    def start_router(self) -> None:
        section = {
            "http": f"127.0.0.1:{self.http_port}",
            "grpc": self.grpc_address,
            "control": self.control_address,
        }
        self.start("router", "tandem.router", {"router": section | self.router})

    def start_worker(self, name: str, role: Role, **overrides: Any) -> None:
        section = getattr(self, role.value) | overrides
        module = self.worker_module or f"tandem.{'worker' if role is Role.COLOCATED else f'{role.value}_worker'}"
        config = {"routers": [self.control_address], "heartbeat_s": 0.1, "role": role.value, "instance": section}
        self.start(name, module, {"name": name} | config)

    def start(self, name: str, module: str, config: dict[str, Any], enter: Sequence[str] = ()) -> None:
        """`enter`: the beginning of the command, of another host."""
        path = self.folder / f"{name}.yaml"
        common = {"model": str(self.model), "model_name": self.model.name, "cluster_token": Cluster.TOKEN}
        if self.cluster_tls is not None:
            common["cluster_tls"] = self.cluster_tls.model_dump(mode="json")
        path.write_text(yaml.safe_dump(common | config))
        with self.log_path(name).open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [*enter, sys.executable, "-m", module, "--config", str(path)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )

    def log_path(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def logs(self) -> str:
        return "\n".join(f"--- {name}\n{self.log_path(name).read_text()[-4000:]}" for name in self.processes)

    def wait_ready(self, prefill: int = 1, decode: int = 1, colocated: int = 0) -> None:
        """Until that many instances of each role are READY and the router serves."""
        wanted = {Role.PREFILL: prefill, Role.DECODE: decode, Role.COLOCATED: colocated}
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            assert not dead, f"{dead} ended at start\n{self.logs()}"
            with contextlib.suppress(httpx.HTTPError):
                healthy = httpx.get(f"{self.url}/health", timeout=1.0, **self.http_options).status_code == 200
                roles = [status.role for status in self.instances()] if healthy else []
                if all(roles.count(role) == count for role, count in wanted.items()):
                    return
            time.sleep(0.1)
        raise AssertionError(f"the cluster was not ready in {START_TIMEOUT_S} s\n{self.logs()}")

    def describe(self) -> FleetDescription:
        async def ask() -> FleetDescription:
            async with open_channel(self.control_address, Cluster.TOKEN, self.cluster_tls) as channel:
                return await describe_fleet(channel, timeout_s=2.0)

        return asyncio.run(ask())

    def instances(self) -> tuple[InstanceStatus, ...]:
        return self.describe().instances

    def status(self, name: str) -> InstanceStatus:
        """Of the worker of that name; the id of an instance begins with it."""
        return next(status for status in self.instances() if status.instance_id.startswith(f"{name}-"))

    def wait_idle(self, timeout_s: float) -> None:
        """Until no worker holds anything for a request. Cached prefixes may stay; nothing may have leaked."""
        deadline = time.monotonic() + timeout_s
        while True:
            statuses = self.instances()
            busy = [
                status
                for status in statuses
                if status.blocks.running or status.blocks.leased or status.waiting_requests or status.running_requests
            ]
            if not busy:
                break
            assert time.monotonic() < deadline, f"still held after {timeout_s} s: {busy}\n{self.logs()}"
            time.sleep(0.05)
        for status in statuses:
            blocks = status.blocks
            assert blocks.leaked == 0, f"{status.instance_id} leaks: {blocks}"
            assert blocks.free + blocks.cached == blocks.total, f"{status.instance_id}: {blocks}"

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all series of that name which have these labels, at the router's /metrics now."""
        page = httpx.get(f"{self.url}/metrics", timeout=10.0, **self.http_options).text
        total = 0.0
        for line in page.splitlines():
            if line.startswith((f"{name}{{", f"{name} ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait(10)

    def stop(self) -> None:
        """SIGTERM to all; each must end by itself, with status 0."""
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        failures = []
        for name, process in self.processes.items():
            try:
                if process.wait(20) != 0:
                    failures.append(f"{name} ended with {process.returncode}")
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
                failures.append(f"{name} did not end on SIGTERM")
        assert not failures, f"{failures}\n{self.logs()}"


AnyCluster = TypeVar("AnyCluster", bound=Cluster)


@contextlib.contextmanager
def running_cluster(
    model: Path,
    folder: Path,
    *,
    num_prefill: int = 1,
    decode_transports: tuple[str, ...] = ("auto",),
    decode_batches: tuple[int, ...] = (),
    num_colocated: int = 0,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    colocated: dict[str, Any] | None = None,
    router: dict[str, Any] | None = None,
    worker_module: str | None = None,
    cluster_tls: ClusterTls | None = None,
    http_options: dict[str, Any] | None = None,
    make: Callable[..., AnyCluster] = Cluster,  # type: ignore[assignment]
) -> Iterator[AnyCluster]:
    """Up, ready, and at the end stopped and free of leaks. One decode instance for each of `decode_transports`, with
    the `max_batch` that `decode_batches` gives it."""
    engine = {"threads": 1, "kv_memory": "64MiB", "dtype": "float32"}
    cluster = make(
        model,
        folder,
        prefill={"engine": engine} | (prefill or {}),
        decode={"engine": engine} | (decode or {}),
        colocated={"engine": engine} | (colocated or {}),
        router=router or {},
        cluster_tls=cluster_tls,
        http_options=http_options or {},
        **({} if worker_module is None else {"worker_module": worker_module}),
    )
    try:
        cluster.start_router()
        for index in range(num_prefill):
            cluster.start_worker(f"prefill-{index}", Role.PREFILL)
        for index, transport in enumerate(decode_transports):
            batch = {"max_batch": decode_batches[index]} if decode_batches else {}
            cluster.start_worker(f"decode-{index}", Role.DECODE, transport=transport, **batch)
        for index in range(num_colocated):
            cluster.start_worker(f"colocated-{index}", Role.COLOCATED)
        cluster.wait_ready(num_prefill, len(decode_transports), num_colocated)
        yield cluster
        cluster.wait_idle(timeout_s=5.0)
    except BaseException:
        for process in cluster.processes.values():
            process.kill()
            process.wait(10)
        raise
    cluster.stop()

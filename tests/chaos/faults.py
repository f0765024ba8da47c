"""A cluster whose processes a test can kill, stop, slow down or cut off, one by one, and heal again."""

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tandem.core.session import InstanceStatus, Role
from tests.chaos.link_proxy import LinkProxy
from tests.cluster.harness import Cluster, free_port


@dataclass
class ChaosCluster(Cluster):
    """Workers run as `tests.chaos.controlled_worker`, and all that others say to a worker goes through its proxy."""

    proxies: dict[str, LinkProxy] = field(default_factory=dict)
    _workers: dict[str, tuple[Role, dict[str, Any]]] = field(default_factory=dict)
    _stopped: set[str] = field(default_factory=set)

    def runs_as(self, name: str, module: str) -> str:
        return super().runs_as(name, module) if module == "router" else "tests.chaos.controlled_worker"

    def start_worker(self, name: str, role: Role, **overrides: Any) -> None:
        self._workers[name] = (role, overrides)
        super().start_worker(name, role, **overrides)

    def start(self, name: str, module: str, config: dict[str, Any]) -> None:
        if module != "router":
            port = free_port()
            if (before := self.proxies.pop(name, None)) is not None:
                before.close()
            self.proxies[name] = LinkProxy(port)
            (self.folder / f"{name}.yaml.address").write_text(f"127.0.0.1:{self.proxies[name].port}")
            config = config | {"listen": f"127.0.0.1:{port}"}
        super().start(name, module, config)

    # --- faults ------------------------------------------------------------------------------------------------------

    def steps(self, name: str, order: str) -> None:
        """What the next steps of a worker do: see `controlled_worker`. "": nothing special."""
        path = self.folder / f"{name}.yaml.steps"
        draft = path.with_suffix(".new")
        draft.write_text(order)
        draft.replace(path)

    def stall(self, name: str) -> None:
        """SIGSTOP."""
        self._stopped.add(name)
        os.kill(self.processes[name].pid, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """SIGCONT."""
        self._stopped.discard(name)
        os.kill(self.processes[name].pid, signal.SIGCONT)

    def link(self, peer: str, instance: str, mode: str) -> None:
        """How what `peer` says to `instance` fares: see `link_proxy`."""
        self.proxies[instance].set(self.processes[peer].pid, mode)

    def kill(self, name: str) -> None:
        self._stopped.discard(name)
        super().kill(name)

    def heal(self) -> None:
        """All as at the start: nothing is disturbed, and what has died is there again. Idle afterwards."""
        for name in list(self._stopped):
            self.resume(name)
        for name in self._workers:
            self.steps(name, "")
            self.proxies[name].heal()
        for name in [name for name, process in self.processes.items() if process.poll() is not None]:
            del self.processes[name]
        if "router" not in self.processes:
            self.start_router()
        for name, (role, overrides) in self._workers.items():
            if name not in self.processes:
                self.start_worker(name, role, **overrides)
        roles = [role for role, _ in self._workers.values()]
        self.wait_ready(*(roles.count(role) for role in (Role.PREFILL, Role.DECODE, Role.COLOCATED)))
        self.wait_idle(timeout_s=5.0)

    def stop(self) -> None:
        for name in list(self._stopped):
            self.resume(name)
        try:
            super().stop()
        finally:
            for proxy in self.proxies.values():
                proxy.close()

    def wait_idle(self, timeout_s: float) -> None:
        """Of the instances that run: the router has forgotten the others first, for which it may take 5 s."""
        expected = {self.instance_id(name) for name in self._workers if name in self.processes}
        until(lambda: {status.instance_id for status in self.instances()} == expected, 5.0, "only they are known")
        super().wait_idle(timeout_s)

    # --- what a test sees --------------------------------------------------------------------------------------------

    def instance_id(self, name: str) -> str:
        """Of the process that runs as `name` now."""
        ready = re.search(r"^(\S+) is ready on", self.log_path(name).read_text(), re.MULTILINE)
        assert ready is not None, f"{name} is not ready"
        return ready[1]

    def status(self, name: str) -> InstanceStatus | None:
        """What the router last heard of it; None if the router does not have it."""
        instance_id = self.instance_id(name)
        return next((status for status in self.instances() if status.instance_id == instance_id), None)

    def is_usable(self, name: str) -> bool:
        """Whether the router sends requests there."""
        return self.metric("tandem_instance_up", instance=self.instance_id(name)) == 1


def until(condition: Callable[[], object], timeout_s: float, what: str) -> float:
    """Waits for it; returns how many seconds that took."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - began_s

"""A cluster whose processes a test can kill, stop, slow down or cut off, one by one, and heal again."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tandem.core.errors import UnavailableError
from tandem.core.session import InstanceStatus, Role
from tests.chaos.link_proxy import LinkProxy
from tests.cluster.harness import START_TIMEOUT_S, Cluster


@dataclass
class ChaosCluster(Cluster):
    """Workers run as `tests.chaos.controlled_worker`, and all that others say to a worker goes through its proxy."""

    worker_module: str | None = "tests.chaos.controlled_worker"
    proxies: dict[str, LinkProxy] = field(default_factory=dict)
    _workers: dict[str, tuple[Role, dict[str, Any]]] = field(default_factory=dict)
    _stopped: set[str] = field(default_factory=set)

    def start_worker(self, name: str, role: Role, **overrides: Any) -> None:
        self._workers[name] = (role, overrides)
        super().start_worker(name, role, **overrides)

    def start(self, name: str, module: str, config: dict[str, Any], enter: Sequence[str] = ()) -> None:
        if (log := self.log_path(name)).exists() and not log.is_symlink():
            log.rename(log.with_suffix(f".{time.monotonic():.0f}.log"))
        if name != "router":
            if (before := self.proxies.pop(name, None)) is not None:
                before.close()
            own_address = self.folder / f"{name}.yaml.own-address"
            own_address.unlink(missing_ok=True)
            self.proxies[name] = LinkProxy(own_address)
            (self.folder / f"{name}.yaml.address").write_text(f"127.0.0.1:{self.proxies[name].port}")
        super().start(name, module, config, enter)

    # --- faults ------------------------------------------------------------------------------------------------------

    def steps(self, name: str, order: str) -> None:
        """What the next steps of a worker do: see `controlled_worker`. "": nothing special."""
        self._order(name, "steps", order)

    def hold_kv(self, *names: str) -> None:
        """Nobody gets KV from these workers until `release_kv`: requests stay in the phase "transfer"."""
        for name in names:
            self._order(name, "kv", "hold")

    def release_kv(self, *names: str) -> None:
        for name in names:
            self._order(name, "kv", "")

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

    def kill(self, *names: str) -> None:
        """SIGKILL, to all before the first has ended."""
        for name in names:
            self.processes[name].kill()
        for name in names:
            self._stopped.discard(name)
            super().kill(name)

    def heal(self) -> None:
        """All as at the start: nothing is disturbed, and what has died is there again. Idle afterwards."""
        for name in list(self._stopped):
            self.resume(name)
        for name in self._workers:
            self.steps(name, "")
            self.release_kv(name)
            self.proxies[name].heal()
        for name in [name for name, process in self.processes.items() if process.poll() is not None]:
            del self.processes[name]
        if "router" in self.processes:
            self.kill("router")
        self.start_router()  # a new one holds nothing against anybody
        for name, (role, overrides) in self._workers.items():
            if name not in self.processes:
                self.start_worker(name, role, **overrides)
        self.wait_known(START_TIMEOUT_S)
        until(lambda: self.metric("tandem_instance_up") == len(self._workers), 10.0, "all are used")
        self.wait_idle(timeout_s=5.0)

    def stop(self) -> None:
        for name in list(self._stopped):
            self.resume(name)
        try:
            super().stop()
        finally:
            for proxy in self.proxies.values():
                proxy.close()

    def wait_known(self, timeout_s: float) -> None:
        """Until the router knows the workers that run, and no others. It takes 3 s to forget one that is silent."""

        def known() -> bool:
            expected = {self._ready_id(name) for name in self._workers if name in self.processes}
            return {status.instance_id for status in self.instances()} == expected

        until(known, timeout_s, "the router knows the workers that run, and no others")

    def wait_idle(self, timeout_s: float) -> None:
        """Of the workers that run."""
        self.wait_known(5.0)
        super().wait_idle(timeout_s)

    def _order(self, name: str, kind: str, order: str) -> None:
        """See `controlled_worker`."""
        path = self.folder / f"{name}.yaml.{kind}"
        draft = path.with_suffix(".new")
        draft.write_text(order)
        draft.replace(path)

    # --- what a test sees --------------------------------------------------------------------------------------------

    def instance_id(self, name: str) -> str:
        """Of the process that runs as `name` now."""
        instance_id = self._ready_id(name)
        assert instance_id is not None, f"{name} is not ready"
        return instance_id

    def _ready_id(self, name: str) -> str | None:
        ready = re.search(r"^(\S+) is ready on", self.log_path(name).read_text(), re.MULTILINE)
        return None if ready is None else ready[1]

    def find(self, name: str) -> InstanceStatus | None:
        """What the router last heard of it; None if the router does not have it."""
        instance_id = self.instance_id(name)
        return next((status for status in self.instances() if status.instance_id == instance_id), None)

    def is_usable(self, name: str) -> bool:
        """Whether the router sends requests there."""
        return self.metric("tandem_instance_up", tandem_instance=name) == 1 and self.find(name) is not None


def until(condition: Callable[[], object], timeout_s: float, what: str) -> float:
    """Waits for it; returns how many seconds that took. A router that does not answer yet counts as no."""
    began_s = time.monotonic()
    while True:
        with contextlib.suppress(UnavailableError, httpx.TransportError):
            if condition():
                break
        assert time.monotonic() - began_s < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - began_s

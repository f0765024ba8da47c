"""A cluster under `tandem serve` whose processes can be named, killed and stopped."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from tandem.profiling.errors import MeasurementError

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0

_UP = re.compile(r"^\s+(\S+) up in \S+ s \(pid (\d+)\)", re.MULTILINE)
_READY = "Ctrl-C ends it."


@dataclass(frozen=True, slots=True)
class ServedProcess:
    """`name` stays over restarts, `pid` does not."""

    name: str
    pid: int


class ServedCluster:
    """`start`, then `stop`; all files are in a folder of its own, which `stop` removes."""

    def __init__(
        self,
        config: Mapping[str, object],
        *,
        settings: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`config`: a serve file or a plan. `settings`: KEY=VALUE for `--set`. `environment`: added to this one."""
        self._config = config
        self._settings = [word for setting in settings for word in ("--set", setting)]
        self._environment = environment or {}
        self._folder = Path(tempfile.mkdtemp(prefix="served-"))  # short: Ray's sockets are in it
        self._output = self._folder / "output"
        self._process: subprocess.Popen[bytes] | None = None
        self._family: list[psutil.Process] = []

    def start(self) -> None:
        """Returns when it is ready. Raises MeasurementError."""
        file = self._folder / "serve.yaml"
        file.write_text(yaml.safe_dump(dict(self._config)))
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TANDEM_STATE_DIR": str(self._folder / "state"),
            "TMPDIR": str(self._folder),
            **self._environment,
        }
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tandem.cli.main", "serve", str(file), *self._settings],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._wait(lambda: _READY in self.output(), START_TIMEOUT_S, "tandem serve is ready")

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def http(self) -> str:
        return self._address(r"HTTP  (http://\S+)/v1")

    @property
    def grpc(self) -> str:
        return self._address(r"gRPC  (\S+)")

    @property
    def controller_pid(self) -> int:
        assert self._process is not None, "start first"
        return self._process.pid

    def processes(self) -> list[ServedProcess]:
        """Routers and workers that run now, as `tandem serve` last said."""
        last = dict(_UP.findall(self.output()))
        return [ServedProcess(name, int(pid)) for name, pid in last.items() if psutil.pid_exists(int(pid))]

    def stop(self) -> list[str]:
        """SIGTERM. Returns what is wrong afterwards: processes that are left, another status than 0."""
        assert self._process is not None, "start first"
        faults = []
        family = psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []
        self._process.terminate()
        try:
            if status := self._process.wait(STOP_TIMEOUT_S):
                faults.append(f"tandem serve ended with status {status}: {self.output()[-500:]}")
        except subprocess.TimeoutExpired:
            faults.append(f"tandem serve did not end within {STOP_TIMEOUT_S:g} s")
            self._process.kill()
            self._process.wait()
        _, left = psutil.wait_procs(family, timeout=10)
        for process in left:
            faults.append(f"process {process.pid} is left running")
            process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        return faults

    def logs(self) -> dict[str, str]:
        """The end of each process's log, by name."""
        state = self._folder / "state"
        return {path.stem: path.read_text(errors="replace")[-4000:] for path in state.rglob("*.log")}

    def _address(self, pattern: str) -> str:
        found = re.search(pattern, self.output())
        assert found is not None, "ready, and no address"
        return found[1]

    def _wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        assert self._process is not None
        until_s = time.monotonic() + timeout_s
        while not condition():
            if self._process.poll() is not None:
                raise MeasurementError(f"tandem serve has ended: {self.output()}")
            if time.monotonic() > until_s:
                raise MeasurementError(f"not within {timeout_s:g} s: {what}: {self.output()}")
            time.sleep(0.1)

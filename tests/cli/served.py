"""`tandem serve` as a process of a test's own, with the files and Ray's sockets in the test's folder."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
FREE_PORTS = tuple(f"--set=router.{name}=127.0.0.1:0" for name in ("http", "grpc", "control"))


@dataclass
class Served:
    process: subprocess.Popen[str]
    environment: dict[str, str]
    output: Path
    http: str
    grpc: str
    cwd: Path = ROOT

    def tandem(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return run_python(["-m", "tandem.cli.main", *arguments], self.environment, stdin, self.cwd)

    def wait_for(self, pattern: str) -> "re.Match[str]":
        return wait_for(self.process, self.output, pattern)


def run_python(
    arguments: list[str], environment: dict[str, str], stdin: str = "", cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def wait_for(process: subprocess.Popen[str], output: Path, pattern: str) -> "re.Match[str]":
    until_s = time.monotonic() + 120
    while time.monotonic() < until_s:
        if match := re.search(pattern, output.read_text(), re.MULTILINE):
            return match
        assert process.poll() is None, output.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{pattern} was never printed:\n{output.read_text()}\n{_logs(output.parent)}")


def _logs(folder: Path) -> str:
    """The ends of all logs, those of Ray included."""
    logs = [path for kind in ("*.log", "*.out", "*.err") for path in sorted(folder.rglob(kind)) if path.stat().st_size]
    return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-2000:]}" for path in logs)


def wait_ended(process: subprocess.Popen[str], output: Path, timeout_s: float) -> int:
    """Its exit status. One that still runs says where each of its threads is, and is ended."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        process.wait(10)
        text = f"{output.read_text()}\n{_logs(output.parent)}"
        raise AssertionError(f"it has not ended within {timeout_s:g} s:\n{text}") from None


def start(
    folder: Path, *arguments: str, package: Path = ROOT, cwd: Path = ROOT, ports: Sequence[str] = FREE_PORTS
) -> tuple[subprocess.Popen[str], dict[str, str], Path]:
    """`folder` has a short path, as the paths of Ray's sockets must be. `package` holds the `tandem` that is run."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "TANDEM_STATE_DIR": str(folder / "state"),
        "TMPDIR": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    output = folder / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tandem.cli.main", "serve", *arguments, *ports],
            env=environment,
            cwd=cwd,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return process, environment, output


@contextmanager
def serving(folder: Path, *arguments: str, package: Path = ROOT, cwd: Path = ROOT) -> Iterator[Served]:
    """Ready, and stopped at the end unless it has ended before."""
    process, environment, output = start(folder, *arguments, package=package, cwd=cwd)
    try:
        wait_for(process, output, r"^Ctrl-C ends it\.$")
        text = output.read_text()
        http = re.search(r"HTTP  https?://(\S+)/v1", text)
        grpc = re.search(r"gRPC  (\S+)", text)
        assert http is not None
        assert grpc is not None
        yield Served(process, environment, output, http[1], grpc[1], cwd)
    finally:
        family = family_of(process.pid) if process.poll() is None else []
        if process.poll() is None:
            process.terminate()
            wait_ended(process, output, 60)
        psutil.wait_procs(family, timeout=10)


def family_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)

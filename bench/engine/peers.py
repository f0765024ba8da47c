"""The engines that bench.engine compares: each runs in its own process, and one of them computes at a time."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common.vllm import vllm_environment

_ENGINE_PROCESS = Path(__file__).resolve().with_name("engine_process.py")
_START_TIMEOUT_S = 600.0
_RESULT_TIMEOUT_S = 900.0


class PeerError(Exception):
    """An engine did not start, or ended. The message is the end of its output."""


@dataclass(frozen=True, slots=True)
class EngineName:
    """An engine and the dtype it computes in, written "vllm" or "vllm:float32"."""

    engine: str
    dtype: str = "bfloat16"

    @classmethod
    def parse(cls, text: str) -> "EngineName":
        engine, _, dtype = text.partition(":")
        return cls(engine, dtype or "bfloat16")

    def __str__(self) -> str:
        return self.engine if self.dtype == "bfloat16" else f"{self.engine}:{self.dtype}"


class Peer:
    """A running engine process. It is stopped (SIGSTOP) while others compute: some engines spin when idle."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path, start_s: float) -> None:
        self._process = process
        self._log = log
        self.start_s = start_s

    def ask(self, **order: Any) -> dict[str, float]:
        """Raises PeerError."""
        self._signal(signal.SIGCONT)
        try:
            return _exchange(self._process, self._log, json.dumps(order), _RESULT_TIMEOUT_S)
        finally:
            self.pause()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def stop(self) -> None:
        self._signal(signal.SIGKILL)
        with self._process:  # waits, and closes the pipes
            pass

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def start_peer(name: EngineName, model: Path, threads: int, log: Path, vllm_python: Path | None, **env: str) -> Peer:
    """Start an engine and wait until it is ready; `Peer.start_s` is the time of that. Raises PeerError."""
    python = str(vllm_python) if name.engine == "vllm" else sys.executable
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **env}
    if vllm_python is not None and name.engine == "vllm":
        environment.update(vllm_environment(vllm_python, threads))
    command = [python, str(_ENGINE_PROCESS), "--engine", name.engine, "--dtype", name.dtype]
    command += ["--model", str(model), "--threads", str(threads)]
    started_s = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
            env=environment,
        )
    try:
        _exchange(process, log, None, _START_TIMEOUT_S)
    except BaseException:
        Peer(process, log, 0.0).stop()
        raise
    peer = Peer(process, log, time.perf_counter() - started_s)
    peer.pause()
    return peer


@contextlib.contextmanager
def stop_all(peers: list[Peer]) -> Iterator[None]:
    """Stops the peers at the end of the block, also those that were appended in it."""
    try:
        yield
    finally:
        for peer in peers:
            peer.stop()


def _exchange(process: "subprocess.Popen[str]", log: Path, order: str | None, timeout_s: float) -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if order is not None:
            process.stdin.write(order + "\n")
            process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline() if selector.select(timeout_s) else ""
    except BrokenPipeError:
        line = ""
    if not line:
        last_lines = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise PeerError(" | ".join(last_lines)[-600:] or "it printed nothing")
    result: dict[str, float] = json.loads(line)
    return result

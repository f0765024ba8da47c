"""`tandem stop` on a process that only looks like `tandem serve`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tandem.cli.main import main
from tandem.deploy.run_state import RunState, StateFolders, process_started_s

_ENDS_AFTER_SIGNALS = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
print("blocked", flush=True)
for _ in range({signals}):
    signal.sigwait((signal.SIGTERM,))
"""


@contextmanager
def _running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends at its `signals`th SIGTERM, with the state file of a run."""
    monkeypatch.setenv("TANDEM_STATE_DIR", str(tmp_path / "state"))
    with subprocess.Popen(
        [sys.executable, "-c", _ENDS_AFTER_SIGNALS.format(signals=signals)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"blocked\n"
            folders = StateFolders.of_environment(os.environ)
            folders.make()
            started_s = process_started_s(process.pid)
            folders.write(RunState(process.pid, started_s, "tiny", "h", "g", "c", "t", "/logs", str(tmp_path / "ray")))
            yield process
        finally:
            process.kill()


def test_the_run_is_told_once_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with _running(tmp_path, monkeypatch, signals=1) as process:
        assert main(["stop"]) == 0
        assert process.wait(10) == 0
    assert capsys.readouterr().out == f"stopped tiny (pid {process.pid})\n"


def test_now_is_a_second_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _running(tmp_path, monkeypatch, signals=2) as process:
        assert main(["stop", "--now", f"--pid={process.pid}"]) == 0
        assert process.wait(10) == 0


def test_a_run_that_does_not_end_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with _running(tmp_path, monkeypatch, signals=2) as process:
        assert main(["stop", "--timeout=0"]) != 0
        assert f"pid {process.pid} still runs after 0 s; try: tandem stop --now" in capsys.readouterr().err

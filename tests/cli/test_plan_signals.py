"""`tandem plan` ends at a signal, whatever it does at that moment, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

_ROOT = Path(__file__).resolve().parents[2]
SLO = """\
model: Llama-3.1-70B
cluster: {nodes: [{device: H100-80GB-SXM5, devices: 8, count: 4}]}
slo: [{ttft_s: 2.0, tpot_s: 0.05}]
workload: {dataset: azure_conv}
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("after_s", [1.0, 2.5, 4.0, 6.0, 9.0])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_planner(tmp_path: Path, number: signal.Signals, after_s: float) -> None:
    (tmp_path / "slo.yaml").write_text(SLO)
    command = [sys.executable, "-m", "tandem.cli.main", "plan", "slo.yaml", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as planning:
        time.sleep(after_s)
        helpers = psutil.Process(planning.pid).children(recursive=True)
        planning.send_signal(number)
        _, errors = planning.communicate(timeout=60)
    assert planning.returncode != 0, "it had ended before"
    assert b"Traceback" not in errors or after_s < 2, "while modules are imported, Python itself says so"
    _, alive = psutil.wait_procs(helpers, timeout=10)
    assert not alive
    assert not (tmp_path / "plan.yaml").exists()

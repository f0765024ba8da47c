"""A served plan whose requests turn out to be others than it was made for: what a user sees of it."""

import json
import re
import tempfile
import urllib.request
from pathlib import Path

import pytest

from tests.cli.served import Served, run_python, serving

BUILT_IN = Path(__file__).resolve().parents[2] / "models" / "tiny-python"
SLO = """\
model: {model}
cluster: {{nodes: [{{device: cpu, devices: 3}}], kv_memory: 128MiB}}
slo: [{{ttft_s: 0.5, tpot_s: 0.05, attainment: 0.9}}]
workload:
  prompt_tokens: {{mean: {prompt}, cv: 0.3}}
  output_tokens: {{mean: {output}, cv: 0.3}}
  max_total_tokens: 900
search: {{layouts: [disaggregated], max_tp: 1, max_pp: 1, requests: 300}}
"""


def load(served: Served, folder: Path, *, prompt: int, output: int, requests: int) -> None:
    slo = folder / "live.yaml"
    slo.write_text(SLO.format(model=BUILT_IN, prompt=prompt, output=output))
    arguments = ["--slo", str(slo), "--rates", "12", "--requests", str(requests)]
    ended = run_python(["-m", "bench.load", "--url", f"http://{served.http}", *arguments], served.environment)
    assert ended.returncode in (0, 3), ended.stderr  # 3: it was late itself


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_plan_that_has_grown_old_is_said_with_what_another_would_gain() -> None:
    with tempfile.TemporaryDirectory(prefix="t") as name:
        folder = Path(name)
        slo = folder / "slo.yaml"
        slo.write_text(SLO.format(model=BUILT_IN, prompt=400, output=8))
        with serving(folder, str(slo), "--set=router.profile_window_s=5") as served:
            assert "2 prefill, 1 decode" in served.output.read_text()
            load(served, folder, prompt=400, output=8, requests=240)
            assert "planning again" not in served.output.read_text(), "these are the requests that it was made for"
            load(served, folder, prompt=16, output=64, requests=360)
            said = served.wait_for(r"^  plan: another plan would gain \+(\d+)%: (.*)$")
            assert int(said[1]) > 20
            assert "decode tp1 on cpu: 1 -> 2" in said[2]
            replan = json.loads(served.tandem("status", "--json").stdout)["fleet"]["replan"]
            gain = replan["proposal"]["gain"]
            assert gain == pytest.approx(int(said[1]) / 100, abs=0.006)
            assert f"proposal: gain +{said[1]}%" in served.tandem("status").stdout
            with urllib.request.urlopen(f"http://{served.http}/metrics", timeout=10) as response:
                metrics = response.read().decode()
            metric = re.search(r"^tandem_replan_proposed_gain(?:{.*})? (\S+)$", metrics, re.MULTILINE)
            assert metric is not None
            assert float(metric[1]) == pytest.approx(gain, abs=1e-6)
            assert served.tandem("chat", "--complete", "--max-tokens", "4", stdin="still the old one\n").returncode == 0

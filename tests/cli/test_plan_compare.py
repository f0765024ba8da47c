"""`tandem plan --compare`: two plans on the same requests."""

from pathlib import Path

import pytest

from tandem.cli.main import main

SLO = """\
model: Llama-3.1-8B
cluster: {nodes: [{device: L4, devices: 4}], memory_share: 0.95}
slo: [{ttft_s: 2.0, tpot_s: 0.2}]
workload: {prompt_tokens: {mean: 400, cv: 1}, output_tokens: {mean: 20, cv: 0}, rate: RATE}
search: {requests: 300}
"""
PLAN = """\
model: Llama-3.1-8B
verdict: disaggregate
slo_file: slo.yaml
groups:
  - {role: prefill, instances: PREFILL, device: L4, kv_tokens: 40000}
  - {role: decode, instances: 1, device: L4, kv_tokens: 40000}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for instances in (1, 2):
        (tmp_path / f"{instances}.yaml").write_text(PLAN.replace("PREFILL", str(instances)))
    return tmp_path


def test_differences_are_paired(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "slo.yaml").write_text(SLO.replace("RATE", "5"))
    assert main(["plan", "--compare", "1.yaml", "2.yaml", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("at 5.00 req/s\n")
    (devices,), (ttft,), (tpot,) = (
        [line for line in out.splitlines() if line.startswith(f"  {name}")] for name in ("devices", "TTFT", "TPOT")
    )
    assert devices.split() == ["devices", "2", "3"]
    assert ttft.endswith("2.yaml is better")
    assert tpot.endswith("not told apart")
    assert "USD per thousand requests" in out
    assert out.endswith("cannot be told apart at these rates; 1.yaml costs less.\n")

    assert main(["plan", "--compare", "1.yaml", "1.yaml", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("+0 to +0") == 3
    assert out.endswith("By their attainment the plans cannot be told apart at these rates.\n")


def test_what_is_missing_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "slo.yaml").write_text(SLO.replace("RATE", "max"))
    assert main(["plan", "--compare", "1.yaml", "2.yaml"]) == 2
    assert "set workload.rate" in capsys.readouterr().err
    (folder / "2.yaml").write_text((folder / "2.yaml").read_text().replace("slo_file: slo.yaml\n", ""))
    assert main(["plan", "--compare", "1.yaml", "2.yaml"]) == 2
    assert "2.yaml names no SLO file" in capsys.readouterr().err

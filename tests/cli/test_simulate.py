"""`tandem simulate` and `tandem schema`, as somebody at a terminal meets them."""

import json
from pathlib import Path

import pytest
import yaml

from tandem.cli.main import main

SLO = """\
model: Llama-3.1-8B
cluster:
  nodes:
    - {device: H100-80GB-SXM5, devices: 4}
slo:
  - {name: chat, ttft_s: 0.5, tpot_s: 0.03, share: 3}
  - {name: batch, ttft_s: 20, tpot_s: 0.2}
workload:
  prompt_tokens: {mean: 400, cv: 0.5}
  output_tokens: {mean: 40, cv: 0.5}
search: {requests: 300}
"""
PLAN = """\
model: Llama-3.1-8B
verdict: disaggregate
slo_file: slo.yaml
groups:
  - {role: prefill, instances: 1, device: H100-80GB-SXM5, kv_tokens: 300000}
  - {role: decode, instances: 2, device: H100-80GB-SXM5, kv_tokens: 300000}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (tmp_path / "slo.yaml").write_text(SLO)
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return path


def simulated(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["simulate", *map(str, argv)]) == 0
    return capsys.readouterr().out


def told(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["simulate", *map(str, argv)]) == 2
    return capsys.readouterr().err


def test_a_mixed_plan_runs_on_both_sorts_of_instances(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slo.yaml").write_text(SLO)
    path = tmp_path / "mixed.yaml"
    colocated = "  - {role: colocated, instances: 1, device: H100-80GB-SXM5, kv_tokens: 300000}\n"
    path.write_text(PLAN.replace("disaggregate", "mixed").replace("instances: 2", "instances: 1") + colocated)
    page = tmp_path / "run.html"
    text = simulated(capsys, path, "--rate", 60, "--report", page)
    assert "300 finished" in text
    for name in ("prefill-0", "decode-0", "colocated-0"):
        assert name in page.read_text()
    assert "300 finished" in simulated(capsys, path, "--rate", 60, "--fail", "colocated-0@1")


def test_it_says_what_each_class_keeps(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = simulated(capsys, plan, "--rate", 5)
    assert text.startswith("300 requests at ")
    assert "300 finished" in text
    assert "90 % within 500 ms, 30.0 ms  100 %" in text
    for row in ("TTFT chat", "TPOT batch", "prefill queue", "KV transfer", "total"):
        assert row in text
    assert text.endswith("All targets are met.\n")


def test_the_same_seed_gives_the_same_run_and_another_one_another(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = simulated(capsys, plan, "--rate", 5)
    assert simulated(capsys, plan, "--rate", 5) == first
    assert simulated(capsys, plan, "--rate", 5, "--seed", 1) != first


def test_too_much_is_called_so(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The router of the plan refuses what would wait for too long."""
    said = simulated(capsys, plan, "--rate", 400, "--requests", 3000)
    assert "OVERLOADED" in said
    assert " refused; " in said


def test_numbers_for_programs_are_those_of_the_table(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulated(capsys, plan, "--rate", 5, "--requests", 200, "--json", tmp_path / "run.json")
    numbers = json.loads((tmp_path / "run.json").read_text())
    assert numbers["requests"] == numbers["finished"] == 200
    chat, batch = numbers["evaluation"]["classes"]
    assert chat["slo"]["name"] == "chat"
    assert batch["ttft_s"]["p50"] > 0
    assert numbers["evaluation"]["meets"] is True
    assert sum(numbers["parts_s"].values()) > 0.1
    assert numbers["goodput"] <= 200 / numbers["duration_s"] + 1e-9


def test_a_report_is_written(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulated(capsys, plan, "--rate", 5, "--report", tmp_path / "run.html")
    assert "Simulation of plan.yaml" in (tmp_path / "run.html").read_text()
    assert "does not exist" in told(capsys, plan, "--rate", 5, "--report", tmp_path / "none" / "run.html")


def test_a_trace_comes_at_its_own_rate(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{0.5 * i},300,20,{'batch' if i % 4 else 'chat'}\n" for i in range(80))
    trace.write_text("arrival_s,prompt_tokens,output_tokens,slo_class\n" + rows)
    assert simulated(capsys, plan, "--trace", trace).startswith("80 requests at 2.00 req/s")
    assert simulated(capsys, plan, "--trace", trace, "--rate", 4).startswith("80 requests at 4.00 req/s")
    simulated(capsys, plan, "--trace", trace, "--json", tmp_path / "run.json")
    classes = json.loads((tmp_path / "run.json").read_text())["evaluation"]["classes"]
    assert classes[1]["requests"] > 2 * classes[0]["requests"]
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n0,1,1\n")
    assert "all requests arrive at once; give --rate R" in told(capsys, plan, "--trace", trace)


def test_a_lost_instance_means_second_attempts(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "attempts" not in simulated(capsys, plan, "--rate", 20)
    text = simulated(capsys, plan, "--rate", 20, "--fail", "decode-1@5-10")
    assert "300 finished in 3" in text
    assert "attempts" in text
    assert "no instance decode-7 to fail" in told(capsys, plan, "--rate", 5, "--fail", "decode-7@5")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--rate", "0"], "--rate must be more than 0"),
        (["--requests", "0"], "'--requests': Input should be greater than or equal to 1"),
        (["--fail", "decode-0"], "'decode-0' is not of the form decode-0@60 or decode-0@60-90"),
        (["--fail", "decode-0@9-3"], "'decode-0@9-3' is not of the form"),
        (["--rate", "5", "--report", "/proc/run.html"], "/proc/run.html cannot be written ("),
        (["--rate", "5", "--json", "/no/such/run.json"], "the folder /no/such does not exist"),
    ],
)
def test_wrong_arguments_are_told(
    plan: Path, capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    assert sentence in told(capsys, plan, *argv)


def test_an_outage_that_nothing_judged_has_seen_is_noted(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = simulated(capsys, plan, "--rate", 20, "--fail", "decode-0@0-0.05")
    assert "note: decode-0 is back before the first request that is judged" in early
    late = simulated(capsys, plan, "--rate", 20, "--fail", "decode-0@100000")
    assert "note: decode-0 would be lost at 100000 s, after the end of the run" in late
    seen = simulated(capsys, plan, "--rate", 20, "--fail", "decode-0@0")
    assert "note:" not in seen


def test_an_slo_file_is_no_plan(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is an SLO file; make a plan of it first: tandem plan" in told(capsys, plan.parent / "slo.yaml")


def test_a_rate_must_be_known(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "says how many requests come per second; give --rate R" in told(capsys, plan)
    (plan.parent / "slo.yaml").write_text(SLO.replace("workload:\n", "workload:\n  rate: 3\n"))
    assert "300 requests at " in simulated(capsys, plan)


def test_targets_must_be_known(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan.write_text(PLAN.replace("slo_file: slo.yaml\n", ""))
    assert "names no SLO file" in told(capsys, plan, "--rate", 5)
    assert "All targets are met" in simulated(capsys, plan, "--rate", 5, "--slo", plan.parent / "slo.yaml")


def test_a_schema_knows_the_settings_that_a_file_may_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "slo"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(yaml.safe_load(SLO)) <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    pool = schema["$defs"]["ClusterSection"]["properties"]["kv_memory"]
    assert '"string"' in json.dumps(pool)  # 512MiB

"""`tandem plan`, then `tandem simulate` of its plan at its rate: the same within the stated interval. One problem, and
30 with `make test-slow`, traces included."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.cli.main import main
from tandem.core.config_file import load_config
from tandem.core.plan import Plan

SMALL: dict[str, Any] = {
    "model": "Llama-3.1-8B",
    "cluster": {"nodes": [{"device": "L4", "devices": 2}], "memory_share": 0.95},
    "slo": [{"ttft_s": 2.0, "tpot_s": 0.2}],
    "search": {"requests": 100, "layouts": ["disaggregated"], "max_tp": 1, "max_pp": 1},
}


def check(folder: Path, slo: dict[str, Any]) -> bool:
    """False if nothing meets the targets."""
    (folder / "slo.yaml").write_text(yaml.safe_dump(slo))
    plan_path, run_path = folder / "plan.yaml", folder / "run.json"
    assert main(["plan", str(folder / "slo.yaml"), "-o", str(plan_path), "--workers", "1", "--no-advice"]) in (0, 3)
    plan = load_config(plan_path, Plan)
    if plan.expected is None or plan.verdict == "infeasible":
        return False
    assert main(["simulate", str(plan_path), "--json", str(run_path)]) == 0
    run = json.loads(run_path.read_text())
    for expected, found in zip(plan.expected.classes, run["evaluation"]["classes"], strict=True):
        assert expected.attainment_ci[0] <= found["attainment"] <= expected.attainment_ci[1]
    for window, found in zip(plan.expected.windows, run["windows"], strict=True):
        assert window.attainment_ci[0] <= found["attainment"] <= window.attainment_ci[1]
    assert run["evaluation"]["meets"]
    return True


def write_trace(path: Path, seed: int) -> None:
    draw, now_s, rows = random.Random(seed), 0.0, []
    for i in range(draw.choice([250, 400, 700])):
        now_s += draw.expovariate(1.0 if i < 200 else draw.choice([0.5, 3.0]))
        rows.append(f"{now_s:.3f},{draw.randint(20, 900 if i < 200 else 2000)},{draw.randint(1, 80)}\n")
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(rows))


def test_a_plan_of_a_trace_and_its_simulation_agree(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.csv", 0)
    assert check(tmp_path, SMALL | {"workload": {"trace": "t.csv"}})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(30))
def test_plans_and_their_simulations_agree(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    workload: dict[str, Any] = {"trace": "t.csv", "cover": draw.choice([0.7, 1.0])}
    write_trace(tmp_path / "t.csv", seed)
    if draw.random() < 0.6:
        workload = {
            "prompt_tokens": {"mean": draw.choice([200, 1000]), "cv": draw.choice([0, 1])},
            "output_tokens": {"mean": draw.choice([10, 100]), "cv": draw.choice([0, 1])},
            "prefix": draw.choice([None, {"share": 0.5, "tokens": 100}]),
        }
    slo = {
        "model": "Llama-3.1-8B",
        "cluster": {"nodes": [{"device": draw.choice(["L4", "A100-80GB-SXM4"]), "devices": draw.choice([2, 3])}]},
        "slo": [{"ttft_s": draw.choice([1.0, 3.0]), "tpot_s": draw.choice([0.1, 0.3]), "attainment": 0.9}],
        "workload": workload,
        "search": {
            "requests": 200,
            "layouts": draw.choice([["disaggregated"], ["colocated"], ["disaggregated", "colocated"]]),
            "max_tp": 1,
            "max_pp": 1,
            "seed": seed,
        },
    }
    check(tmp_path, slo)

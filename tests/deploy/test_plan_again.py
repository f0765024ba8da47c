"""The planner's own process: from the folder of a live workload to a plan, a report and a result."""

import asyncio
from pathlib import Path

import pytest

from tandem.core.config_file import load_config
from tandem.core.errors import UnavailableError
from tandem.core.plan import Plan
from tandem.core.slo_file import SloFile
from tandem.core.workload_profile import ProfileSnapshot
from tandem.deploy.planner_process import plan_in_process
from tandem.placement.replanning.live_workload import SLO_FILE_NAME, write_replan_input

DEVICE = "H100-80GB-SXM5"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    slo_file = SloFile.model_validate(
        {
            "model": "Llama-3.1-8B",
            "cluster": {"nodes": [{"device": DEVICE, "devices": 1}]},
            "slo": [{"ttft_s": 0.5, "tpot_s": 0.05}],
            "workload": {"prompt_tokens": {"mean": 500}, "output_tokens": {"mean": 20}, "rate": 4.0},
            "search": {"requests": 100},
        }
    )
    group = {"role": "colocated", "instances": 1, "device": DEVICE, "kv_tokens": 300_000}
    running = Plan.model_validate({"model": "Llama-3.1-8B", "verdict": "colocate", "groups": [group]})
    snapshot = ProfileSnapshot(
        window=0,
        window_s=50.0,
        arrivals=200,
        arrival_cv=1.0,
        finished=200,
        arrival_s=tuple(0.25 * index for index in range(200)),
        prompt_tokens=(500,) * 200,
        output_tokens=(20,) * 200,
        cached_tokens=(0,) * 200,
        slo_class=(0,) * 200,
    )
    write_replan_input(tmp_path / "again", running, slo_file, snapshot)
    return tmp_path / "again"


@pytest.mark.unmeasured
def test_a_live_workload_becomes_a_plan_and_its_gain(folder: Path) -> None:
    result = asyncio.run(plan_in_process(folder))
    plan = load_config(folder / "plan.yaml", Plan)
    assert result.summary == plan.summary
    assert (result.changes, result.regains) == ((), False), "one device has one shape"
    assert 0 <= result.gain < 0.1, "the same device, and no worse by the same simulation"
    assert 0.9 < result.attainment <= 1
    assert plan.slo_file == (folder / SLO_FILE_NAME).resolve(), "the plan can be made again"
    assert (folder / "report.html").read_text().startswith("<!")


def test_a_file_that_cannot_be_read_is_named_in_the_log(folder: Path) -> None:
    (folder / SLO_FILE_NAME).write_text("model: [")
    with pytest.raises(UnavailableError, match=r"its log is .*planner\.log"):
        asyncio.run(plan_in_process(folder))
    assert SLO_FILE_NAME in (folder / "planner.log").read_text()

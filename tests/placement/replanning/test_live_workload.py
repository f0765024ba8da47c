"""The planner's input for live requests."""

from pathlib import Path

import numpy as np
import pytest

from tandem.core.config_file import load_config
from tandem.core.errors import ConfigError
from tandem.core.plan import Plan
from tandem.core.slo_file import SloFile
from tandem.core.workload_profile import ProfileSnapshot
from tandem.placement.replanning.live_workload import (
    RUNNING_PLAN_NAME,
    SLO_FILE_NAME,
    planned_workload,
    write_replan_input,
)
from tandem.placement.workload.streams import make_stream
from tandem.placement.workload.traces import load_trace

PLAN = Plan.model_validate(
    {
        "model": "tiny",
        "verdict": "colocate",
        "groups": [{"role": "colocated", "instances": 1, "device": "cpu", "kv_tokens": 9}],
    }
)


def make_slo_file(rate: float | str = "max", num_classes: int = 1) -> SloFile:
    return SloFile.model_validate(
        {
            "model": "tiny",
            "cluster": {"nodes": [{"device": "cpu"}]},
            "slo": [{"name": f"class-{i}", "ttft_s": 1 + i, "tpot_s": 0.1} for i in range(num_classes)],
            "workload": {"prompt_tokens": {"mean": 50}, "output_tokens": {"mean": 20}, "rate": rate},
            "search": {"requests": 500},
        }
    )


def make_snapshot(**changes: object) -> ProfileSnapshot:
    values: dict[str, object] = {
        "window": 0,
        "window_s": 50.0,
        "arrivals": 400,
        "arrival_cv": 2.0,
        "finished": 390,
        "arrival_s": tuple(0.25 * i + 0.01 * second for i in range(200) for second in (0, 1)),
        "prompt_tokens": tuple(range(1, 201)),
        "output_tokens": tuple(range(201, 401)),
        "cached_tokens": (0,) * 200,
        "slo_class": (0,) * 200,
    }
    return ProfileSnapshot(**(values | changes))  # type: ignore[arg-type]


def test_the_trace_has_the_sampled_pairs_at_the_windows_own_arrivals(tmp_path: Path) -> None:
    write_replan_input(tmp_path / "q", PLAN, make_slo_file(), make_snapshot())
    stream = load_trace(tmp_path / "q" / "workload.csv")
    assert len(stream) == 8 * 500
    assert stream.rate == pytest.approx(8.0, rel=0.02)
    assert stream.arrival_s[:4].tolist() == [0.0, 0.01, 0.25, 0.26]
    assert stream.arrival_s[400:402].tolist() == [50.0, 50.01], "the window over and over"
    assert np.array_equal(stream.output_tokens, stream.prompt_tokens + 200), "lengths of one request stay together"
    counts = np.bincount(stream.prompt_tokens)[1:]
    assert set(counts.tolist()) == {20}, "each of 200 is taken once before any is taken again"


@pytest.mark.parametrize(("asked", "expected"), [("max", "max"), (3.0, 8.0)])
def test_the_replan_input_is_an_slo_file_with_the_live_workload(
    tmp_path: Path, asked: object, expected: object
) -> None:
    slo_file = make_slo_file(asked)  # type: ignore[arg-type]
    write_replan_input(tmp_path / "q", PLAN, slo_file, make_snapshot())
    question = load_config(tmp_path / "q" / SLO_FILE_NAME, SloFile)
    assert question.workload.rate == expected
    assert question.model_copy(update={"workload": slo_file.workload}) == slo_file
    assert load_config(tmp_path / "q" / RUNNING_PLAN_NAME, Plan) == PLAN
    assert len(make_stream(question.workload, question.slo, count=500, rate=8.0, seed=0)) == 500


def test_cached_tokens_become_a_common_prefix(tmp_path: Path) -> None:
    write_replan_input(tmp_path / "q", PLAN, make_slo_file(), make_snapshot(cached_tokens=(0,) * 150 + (40, 60) * 25))
    prefix = load_config(tmp_path / "q" / SLO_FILE_NAME, SloFile).workload.prefix
    assert prefix is not None
    assert (prefix.share, prefix.tokens, prefix.groups) == (0.25, 50, 1)


def test_known_classes_are_written_by_name(tmp_path: Path) -> None:
    slo_file = make_slo_file(num_classes=2)
    write_replan_input(tmp_path / "q", PLAN, slo_file, make_snapshot(slo_class=(0, 1) * 100))
    question = load_config(tmp_path / "q" / SLO_FILE_NAME, SloFile)
    stream = make_stream(question.workload, question.slo, count=500, rate=8.0, seed=0)
    assert np.array_equal(stream.slo_class, (stream.prompt_tokens + 1) % 2)


def test_a_window_without_arrivals_is_a_very_slow_trace(tmp_path: Path) -> None:
    write_replan_input(tmp_path / "q", PLAN, make_slo_file(), make_snapshot(arrivals=0, arrival_s=()))
    assert load_trace(tmp_path / "q" / "workload.csv").rate == pytest.approx(1 / 50.0)


def test_a_plan_without_rate_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="no rate"):
        planned_workload(PLAN, make_slo_file("max"))
    assert planned_workload(PLAN, make_slo_file(3.0)).rate == 3.0


def test_the_planned_workload_of_a_trace_is_all_of_it(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    rows = "".join(f"{i},{100 if i < 500 else 900},20\n" for i in range(2000))
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    slo_file = make_slo_file(rate=2.0)
    slo_file = slo_file.model_copy(update={"workload": slo_file.workload.model_validate({"trace": trace, "rate": 2.0})})
    planned = planned_workload(PLAN, slo_file)
    assert len(planned.prompt_tokens) == 2000
    assert planned.prompt_tokens.mean() == 700
    assert planned.rate == 2.0

"""Plan files: written, edited by hand, read back."""

import math
from pathlib import Path

import pytest

from tandem.core.config_file import dump_config, load_config
from tandem.core.errors import ConfigError
from tandem.core.plan import Alternative, Expected, ExpectedClass, Plan, PlanGroup, Quantiles
from tandem.core.slo import SloClass

PREFILL = PlanGroup(
    role="prefill", instances=2, device="H100", tp=2, devices=(("0:0", "0:1"), ("1:0", "1:1")), kv_tokens=9
)
DECODE = PlanGroup(role="decode", instances=1, device="H100", kv_tokens=100_000, max_batch=128)
QUANTILES = Quantiles(mean=0.2, p50=0.19, p90=0.3, p99=0.5)
PLAN = Plan(
    model="Llama-3.1-70B",
    verdict="disaggregate",
    summary="Zwei vor einem: 2 × tp2.",
    groups=(PREFILL, DECODE),
    expected=Expected(
        rate=10.0,
        goodput=11.0,
        goodput_ci=(10.5, 11.5),
        goodput_per_device=2.2,
        classes=(
            ExpectedClass(
                slo=SloClass(ttft_s=0.4, tpot_s=0.04),
                attainment=0.92,
                attainment_ci=(0.9, 0.94),
                ttft_s=QUANTILES,
                tpot_s=QUANTILES,
            ),
        ),
    ),
    alternatives=(Alternative(description="3 x colocated", num_devices=3, reason="TTFT"),),
)


def _edited(folder: Path, old: str, new: str) -> Path:
    text = dump_config(PLAN)
    assert old in text
    path = folder / "plan.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


def _mistakes(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, Plan)
    return caught.value.message.splitlines()


def test_a_plan_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("# A plan\n" + dump_config(PLAN))
    assert load_config(path, Plan) == PLAN


def test_a_latency_without_values_reads_back(tmp_path: Path) -> None:
    nothing = Quantiles(mean=math.nan, p50=math.nan, p90=math.nan, p99=math.nan)
    assert PLAN.expected is not None
    one_token = PLAN.expected.classes[0].model_copy(update={"tpot_s": nothing})
    path = tmp_path / "plan.yaml"
    path.write_text(
        dump_config(PLAN.model_copy(update={"expected": PLAN.expected.model_copy(update={"classes": (one_token,)})}))
    )
    read = load_config(path, Plan)
    assert read.expected is not None
    assert math.isnan(read.expected.classes[0].tpot_s.p99)


def test_only_an_infeasible_plan_may_have_no_groups(tmp_path: Path) -> None:
    Plan(model="m", verdict="infeasible", groups=())
    path = tmp_path / "plan.yaml"
    path.write_text("model: m\nverdict: colocate\ngroups: []\n")
    assert _mistakes(path) == [f"{path} line 3: groups: must have at least one group of instances"]


def test_a_mistake_is_reported_with_its_line(tmp_path: Path) -> None:
    path = _edited(tmp_path, "tp: 2", "tp: 4")
    assert _mistakes(path)[0].endswith("groups.0.devices: each instance needs 4 devices (tp 4 x pp 1)")


def test_num_devices_counts_all_ranks() -> None:
    assert PLAN.num_devices == 2 * 2 + 1

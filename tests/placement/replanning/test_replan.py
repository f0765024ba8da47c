"""Planning again: the forecast of the running plan, and the gain of a new plan."""

import math
from collections.abc import Iterator
from functools import cache
from unittest import mock

import pytest

from tandem.core.plan import Expected, Plan, PlanGroup
from tandem.core.slo_file import SloFile
from tandem.placement.evidence import Planned
from tandem.placement.replanning import replan as replan_module
from tandem.placement.replanning.replan import Forecast, changes_between, gain_of, replan
from tandem.placement.replanning.replan import forecast_of as real_forecast_of

DEVICE = "H100-80GB-SXM5"
RATE = 30.0  # which either plan can take


def make_slo_file(objective: str = "goodput", *, prompt_tokens: int = 1000, output_tokens: int = 50) -> SloFile:
    return SloFile.model_validate(
        {
            "model": "Llama-3.1-8B",
            "cluster": {"nodes": [{"device": DEVICE, "devices": 4}]},
            "slo": [{"ttft_s": 0.5, "tpot_s": 0.05}],
            "workload": {
                "prompt_tokens": {"mean": prompt_tokens, "cv": 0.5},
                "output_tokens": {"mean": output_tokens, "cv": 0.5},
                "rate": 4.0,
            },
            "objective": objective,
            "search": {"requests": 100},
        }
    )


def split(prefill: int, decode: int, goodput: float | None = None, cost_per_hour: float | None = None) -> Plan:
    shape = {"device": DEVICE, "kv_tokens": 300_000}
    groups = [{"role": "prefill", "instances": prefill}, {"role": "decode", "instances": decode}]
    expected = None
    if goodput is not None:
        expected = Expected(
            rate=4.0,
            goodput=goodput,
            goodput_ci=(goodput, goodput),
            goodput_per_device=goodput / (prefill + decode),
            cost_per_hour=cost_per_hour,
            classes=(),
        )
    return Plan(
        model="Llama-3.1-8B",
        verdict="disaggregate",
        groups=tuple(PlanGroup.model_validate(group | shape) for group in groups),
        expected=expected,
    )


class Planner:
    """Returns the same plan for every SLO file, without evidence."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.asked: list[SloFile] = []

    def __call__(self, slo_file: SloFile) -> Planned:
        self.asked.append(slo_file)
        return Planned(self.plan, evidence=None)  # type: ignore[arg-type]


@cache
def _simulated(plan: str, slo_file: str, rate: float, guess: float) -> Forecast:
    return real_forecast_of(Plan.model_validate_json(plan), SloFile.model_validate_json(slo_file), rate, guess)


def forecast_of(plan: Plan, slo_file: SloFile, rate: float, guess: float | None = None) -> Forecast:
    """The real function, cached: a call takes dozens of simulations."""
    bare = plan.model_copy(update={"expected": None})
    return _simulated(bare.model_dump_json(), slo_file.model_dump_json(), rate, guess or rate)


@pytest.fixture(autouse=True)
def replan_forecasts_once() -> Iterator[None]:
    with mock.patch.object(replan_module, "forecast_of", forecast_of):
        yield


def test_a_forecast_depends_on_the_number_of_prefill_instances() -> None:
    """Three prefill instances serve a higher rate of long prompts with short outputs than one does."""
    slo_file = make_slo_file()
    few, many = (forecast_of(split(prefill, 4 - prefill), slo_file, RATE) for prefill in (1, 3))
    assert 0 < few.goodput < 0.6 * many.goodput
    assert many.meets
    assert many.attainment > 0.95


def test_a_rate_beyond_goodput_is_not_met() -> None:
    slo_file = make_slo_file()
    forecast = forecast_of(split(1, 3), slo_file, RATE)
    beyond = forecast_of(split(1, 3), slo_file, 1.5 * forecast.goodput)
    assert not beyond.meets
    assert beyond.goodput == pytest.approx(forecast.goodput, rel=0.1), "what a plan can take does not depend on it"


def test_both_plans_are_simulated_in_the_same_way() -> None:
    slo_file, running = make_slo_file(), split(1, 3)
    before, after = (forecast_of(split(prefill, 4 - prefill), slo_file, RATE) for prefill in (1, 3))
    planner = Planner(split(3, 1, goodput=1e6))
    answer = replan(running, slo_file, RATE, planner)
    assert planner.asked == [slo_file]
    assert answer.current == before
    assert answer.gain == pytest.approx(after.goodput / before.goodput - 1), "whatever the search promises"
    assert not answer.regains, "the plan that runs would do at this rate"
    assert set(answer.changes) == {f"prefill tp1 on {DEVICE}: 1 -> 3", f"decode tp1 on {DEVICE}: 3 -> 1"}


def test_the_same_plan_gains_nothing() -> None:
    answer = replan(split(1, 3), make_slo_file(), RATE, Planner(split(1, 3, goodput=1e6)))
    assert (answer.gain, answer.changes) == (0.0, ())


def test_targets_are_regained_if_only_the_new_plan_meets_them() -> None:
    slo_file, running = make_slo_file(), split(1, 3)
    rate = 1.5 * forecast_of(running, slo_file, RATE).goodput
    assert replan(running, slo_file, rate, Planner(split(3, 1))).regains
    assert not replan(running, slo_file, rate, Planner(split(1, 3))).regains


def test_an_infeasible_plan_gains_nothing() -> None:
    infeasible = Plan(model="Llama-3.1-8B", verdict="infeasible", groups=())
    answer = replan(split(1, 3), make_slo_file(), RATE, Planner(infeasible))
    assert (answer.gain, answer.regains) == (0.0, False)


def test_the_gain_is_in_cost_if_the_running_plan_meets_its_targets() -> None:
    slo_file = make_slo_file("cheapest")
    fine, lost, small = (
        Forecast(10.0, 0.99, meets=True),
        Forecast(2.0, 0.5, meets=False),
        Forecast(4.0, 0.95, meets=True),
    )
    running, smaller = split(2, 2, 8.0, cost_per_hour=12.0), split(1, 1, 4.0, cost_per_hour=6.0)
    assert gain_of((running, fine), (smaller, small), slo_file) == pytest.approx(1.0)
    assert gain_of((running, lost), (smaller, small), slo_file) == pytest.approx((4.0 / 2) / (2.0 / 4) - 1)
    in_devices = gain_of((split(2, 2), fine), (split(1, 2, 4.0), small), slo_file)
    assert in_devices == pytest.approx(4 / 3 - 1), "devices, without prices"


def test_the_gain_over_no_goodput_is_infinite() -> None:
    nothing, some = Forecast(0.0, 0.0, meets=False), Forecast(5.0, 1.0, meets=True)
    assert gain_of((split(1, 3), nothing), (split(3, 1), some), make_slo_file()) == math.inf


def test_plans_with_different_settings_change_no_instances() -> None:
    assert changes_between(split(1, 3), split(1, 3, goodput=9.0)) == ()

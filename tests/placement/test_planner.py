"""From an SLO file to a plan and its evidence."""

import math
from pathlib import Path

import pytest

from bench.common.distserve_costs import DEVICE, DistServeSource
from tandem.core.plan import Plan
from tandem.core.slo import SloClass
from tandem.core.slo_file import ClusterSection, NodeSection, SearchSection, SloFile, WorkloadSection
from tandem.placement.planner import plan


def slo_file(**changed: object) -> SloFile:
    asked = {
        "model": "OPT-13B",
        "cluster": ClusterSection(nodes=(NodeSection(device=DEVICE, devices=2),)),
        "slo": (SloClass(ttft_s=0.4, tpot_s=0.1),),
        "workload": WorkloadSection(dataset="distserve_sharegpt"),
        "search": SearchSection(layouts=("disaggregated",), max_tp=1, max_pp=1, requests=200),
    }
    return SloFile.model_validate({**asked, **changed})


@pytest.mark.measured
def test_a_plan_has_predictions_and_evidence() -> None:
    told: list[float] = []
    planned = plan(
        slo_file(), progress=lambda share, _: told.append(share), workers=1, source=DistServeSource("OPT-13B")
    )
    answer, evidence = planned.plan, planned.evidence
    assert answer.verdict == "disaggregate"
    assert [group.devices for group in answer.groups] == [(("0:0",),), (("0:1",),)]
    assert answer.expected is not None
    low, high = answer.expected.goodput_ci
    assert 0 < low <= answer.expected.goodput <= high
    assert answer.expected.classes[0].attainment >= 0.9
    (attainment,) = evidence.attainments
    rates = [point.rate for point in attainment.points]
    assert rates == sorted(rates)
    assert attainment.points[0].both > attainment.points[-1].both
    assert attainment.knee_rate == pytest.approx(answer.expected.goodput)
    assert {bound.role for bound in evidence.bounds} == {"prefill", "decode"}
    assert {point.axis for point in evidence.sensitivity} >= {"rate", "prompt_tokens", "ttft_target"}
    assert math.isnan(evidence.error.model_error)
    assert sum(candidate.chosen for candidate in evidence.candidates) == 1
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert Plan.model_validate(answer.model_dump()) == answer


def test_infeasible_targets_are_reported_with_the_nearest_feasible_ones() -> None:
    asked = slo_file(slo=(SloClass(ttft_s=0.01, tpot_s=0.1),))
    answer = plan(asked, workers=1, source=DistServeSource("OPT-13B"))
    assert answer.plan.verdict == "infeasible"
    assert "the nearest feasible targets are" in answer.evidence.nearest


def test_targets_that_every_request_misses_in_bursts_are_raised_until_a_deployment_is_found(tmp_path: Path) -> None:
    """Six requests at one instant, however slow the trace is replayed: 1.25 times the latency of one is not enough."""
    trace = tmp_path / "bursts.csv"
    rows = [f"2024-05-10 00:{minute:02}:00.0,400,20" for minute in range(60) for _ in range(6)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    asked = slo_file(slo=(SloClass(ttft_s=0.1, tpot_s=0.1),), workload={"trace": str(trace)})
    answer = plan(asked, workers=1, source=DistServeSource("OPT-13B"))
    assert answer.plan.verdict == "infeasible"
    assert answer.plan.groups
    assert "the nearest feasible targets are" in answer.evidence.nearest


def test_a_model_that_does_not_fit_has_a_plan_without_groups() -> None:
    asked = slo_file(model="OPT-66B")
    answer = plan(asked, workers=1, source=DistServeSource("OPT-66B"))
    assert answer.plan.verdict == "infeasible"
    assert answer.plan.groups == ()

"""The policies that are compared: each serves every request, and the figures are what they are called."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.policies.__main__ import CASES, POLICIES, Policy, attainment, main, make_deployment
from bench.policies.selectors import with_stale_reports
from tandem.core.request_slo import RequestSlo
from tandem.placement.simulator import simulate
from tests.placement.simulator.deployments import poisson

_STREAM = poisson(60, 20.0, prompt=600, output=20)


@pytest.mark.parametrize("name", POLICIES)
def test_each_policy_serves_all_requests(name: str) -> None:
    case = replace(CASES[0], prefill=1, decode=1)
    result = simulate(make_deployment(case, POLICIES[name]), _STREAM)
    assert result.finished.all()
    assert attainment(result, RequestSlo("lax", 1e6, 1e6)) == 1.0
    assert attainment(result, RequestSlo("none", 1e-9, 1e-9)) == 0.0


@pytest.mark.parametrize("name", ["balanced", "goodput"])
def test_late_reports_and_wrong_step_costs_lose_no_request(name: str) -> None:
    policy = Policy(with_stale_reports(POLICIES[name].selector_type, 0.5))
    assert simulate(make_deployment(CASES[0], policy, error=0.5), _STREAM).finished.all()


def test_goodput_is_higher_where_prefill_is_short_of_time() -> None:
    """One prefill and one decode instance, at a load that prefill alone cannot serve."""
    case, stream = replace(CASES[0], prefill=1, decode=1), poisson(300, 18.0, prompt=1200, output=20, seed=3)
    attained = {
        name: attainment(simulate(make_deployment(case, POLICIES[name]), stream), case.slo)
        for name in ("balanced", "goodput")
    }
    assert attained["goodput"] > attained["balanced"] + 0.2


def test_missing_data_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path)]) == 1
    assert "give the data folder" in capsys.readouterr().err

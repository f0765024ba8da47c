"""The goodput with a change, divided by that without, and its interval."""

from dataclasses import replace

import pytest

from tandem.core.slo import SloClass
from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.mapper import SerialMapper
from tandem.placement.search.problem import Problem
from tandem.placement.search.simulated_effects import Effect, Variant, simulate_effects
from tandem.placement.search.space import search_space
from tests.placement.search.problems import SLO, problem

QUESTION = problem(4, layouts=("colocated",), max_tp=1).with_requests(100)


def instances(count: int) -> CandidateDeployment:
    """Colocated instances of one device."""
    kind = search_space(QUESTION, SerialMapper()).kinds.colocated[0]
    return CandidateDeployment((InstanceGroup(kind, count),))


def effect(question: Problem, count: int, changed: Problem, changed_count: int) -> Effect | None:
    unchanged = Variant(question, instances(count), 10.0 * count)
    variant = Variant(changed, instances(changed_count), 10.0 * changed_count)
    (found,) = simulate_effects(unchanged, [variant], SerialMapper())
    return found


def test_no_change_is_a_ratio_of_one_for_certain() -> None:
    assert effect(QUESTION, 2, QUESTION, 2) == Effect(1.0, (1.0, 1.0))


def test_one_more_instance_serves_certainly_more() -> None:
    found = effect(QUESTION, 1, QUESTION, 2)
    assert found is not None
    assert found.interval[0] <= found.ratio <= found.interval[1]
    assert found.interval[0] > 1.0
    assert 1.7 < found.ratio < 2.7, "twice the instances, which share bursts"


def test_targets_that_are_missed_at_every_rate_are_a_ratio_of_zero() -> None:
    never = replace(QUESTION, classes=(SloClass(ttft_s=1e-4, tpot_s=1e-4),))
    assert effect(QUESTION, 1, never, 1) == Effect(0.0, (0.0, 0.0))
    assert effect(never, 1, QUESTION, 1) is None


@pytest.mark.slow
def test_a_looser_target_serves_no_less() -> None:
    looser = replace(QUESTION, classes=(SLO.model_copy(update={"ttft_s": 2 * SLO.ttft_s}),))
    found = effect(QUESTION, 1, looser, 1)
    assert found is not None
    assert found.ratio >= 1.0
    assert found.interval[1] > 1.0

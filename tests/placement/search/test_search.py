"""Guarantees of the search, on small problems with the real simulator."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from tandem.core.parallel import ParallelShape
from tandem.core.slo import SloClass
from tandem.core.slo_file import Layout, NodeSection
from tandem.deploy.plan_serving import planned_nodes, serve_config_of
from tandem.deploy.topology import Machine
from tandem.placement.costs.calibration import ShapeCalibration
from tandem.placement.planner import PlanResult, search
from tandem.placement.rank_notes import rank_notes
from tandem.placement.search.best_first import EvaluatedDeployment
from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.kinds import with_budget, with_slack
from tandem.placement.search.limits import limits_of_variants
from tandem.placement.search.mapper import SerialMapper, local_mapper
from tandem.placement.search.packing import assign_devices
from tandem.placement.search.problem import Problem
from tandem.placement.search.space import search_space
from tandem.placement.search.trial import plan_of
from tandem.placement.search.variants import variants_of
from tests.placement.costs.test_calibration import TP2, calibration
from tests.placement.search.problems import A100, H100, ToySource, problem

BUILT_IN = Path(__file__).parents[3] / "models" / "tiny-python"


def ask(question: Problem) -> PlanResult:
    return search(question, SerialMapper(), lambda share, text: None)


def goodput(question: Problem) -> float:
    evaluated = ask(question).chosen
    return 0.0 if evaluated is None else evaluated.goodput or 0.0


def test_more_devices_never_lower_the_goodput() -> None:
    found = [goodput(problem(devices)) for devices in range(2, 8)]
    assert found == sorted(found)
    assert found[-1] > 2 * found[0]


def test_more_nodes_never_lower_the_goodput() -> None:
    found = [goodput(problem(3, nodes)) for nodes in range(1, 4)]
    assert found == sorted(found)


@pytest.mark.parametrize(("ttft_s", "tpot_s"), [(0.25, 0.03), (0.2, 0.05), (0.5, 0.1)])
def test_a_looser_slo_never_lowers_the_goodput(ttft_s: float, tpot_s: float) -> None:
    assert goodput(problem(5, slo=SloClass(ttft_s=ttft_s, tpot_s=tpot_s))) >= goodput(problem(5))


def test_the_result_does_not_depend_on_the_number_of_workers() -> None:
    first, second = ask(problem(5)), ask(problem(5))
    assert first.chosen == second.chosen
    with local_mapper(2) as mapper:
        helped = search(problem(5), mapper, lambda share, text: None)
    assert helped.chosen is not None
    assert first.chosen is not None
    assert (helped.chosen.deployment, helped.chosen.goodput) == (first.chosen.deployment, first.chosen.goodput)


def test_a_plan_fits_its_devices_and_its_memory() -> None:
    question = problem(3, 2, more=[NodeSection(device=H100, devices=2, count=1)])
    for evaluated in ask(question).search.evaluated:
        plan = plan_of(question, evaluated.deployment)
        used = Counter(name for group in plan.groups for ranks in group.devices for name in ranks)
        assert max(used.values()) == 1
        for group in plan.groups:
            of_type = {node.name for node in question.cluster.nodes if node.device.name == group.device}
            assert all(name.split(":")[0] in of_type for ranks in group.devices for name in ranks)
            assert group.kv_tokens <= question.source.kv_tokens(group.device, group.shape)


def test_low_affinity_keeps_both_phases_of_a_unit_on_one_node() -> None:
    question = problem(3, 3, affinity="low")
    deployment = ask(question).chosen.deployment  # type: ignore[union-attr]
    assert deployment.same_node
    prefill, decode = (
        [{name.split(":")[0] for name in ranks} for ranks in instances]
        for instances in assign_devices(deployment, question.cluster)
    )
    assert all(len(nodes) == 1 for nodes in (*prefill, *decode))
    assert {*map(min, prefill)} == {*map(min, decode)}


@pytest.mark.parametrize(("shapes", "num_ranks"), [((), {1}), ((TP2,), {1, 2})])
def test_slack_is_for_chunks_of_shapes_whose_step_times_are_known(
    shapes: tuple[ShapeCalibration, ...], num_ranks: set[int]
) -> None:
    space = search_space(problem(2, layouts=("colocated",), slo=SloClass(ttft_s=0.5, tpot_s=0.05)), SerialMapper())
    kinds = space.kinds.colocated
    calibrations = {A100: calibration(shapes=shapes)}
    limits = limits_of_variants(space.limits, partial(with_slack, calibrations=calibrations))
    assert {(kind.policy, kind.shape.num_ranks) for kind in kinds} >= {
        ("chunked", 1),
        ("chunked", 2),
        ("prompt_first", 1),
    }
    for kind in kinds:
        assert with_slack(kind, {}) == kind
        variant = with_slack(kind, calibrations)
        if kind.policy == "chunked" and kind.shape.num_ranks in num_ranks:
            assert (variant.policy, variant.max_batch_tokens) == ("slack", max(512, kind.max_batch_tokens))
            assert limits[variant].rate >= space.limits[kind].rate > 0
        else:
            assert variant == kind


def test_budgets_between_those_of_the_search_are_compared_with_its_best() -> None:
    question = problem(1, layouts=("colocated",), slo=SloClass(ttft_s=0.5, tpot_s=0.05))
    space = search_space(question, SerialMapper())
    chunked = [kind for kind in space.kinds.colocated if kind.policy == "chunked"]
    best, worse = (EvaluatedDeployment(CandidateDeployment((InstanceGroup(kind, 1),)), 9, 9, 9) for kind in chunked[:2])
    budgets = {
        group.kind.max_batch_tokens
        for variant in variants_of(question, (best, replace(worse, goodput=1.0)))
        for group in variant.deployment.groups
    }
    assert budgets == {chunked[0].max_batch_tokens * 3 // 4, chunked[0].max_batch_tokens * 3 // 2}
    assert all(with_budget(kind, 1.5) in space.limits for kind in chunked)


def test_a_model_that_does_not_fit_is_not_served() -> None:
    answer = ask(problem(2, source=ToySource(tokens=100)))
    assert answer.chosen is None
    assert "longest request" in answer.space.kinds.rejected[0].reason


def test_an_infeasible_slo_gets_the_nearest_feasible_targets() -> None:
    answer = ask(problem(3, slo=SloClass(ttft_s=0.2, tpot_s=0.002)))
    assert not answer.met
    assert answer.chosen is not None
    (nearest,) = answer.space.problem.classes
    assert nearest.ttft_s == 0.2
    assert 0.005 < nearest.tpot_s < 0.01


def test_the_cheapest_deployment_serves_the_rate_and_a_higher_rate_costs_no_less() -> None:
    costs = []
    for rate in (3.0, 12.0, 24.0):
        answer = ask(problem(8, rate=rate))
        assert answer.met
        assert answer.chosen is not None
        costs.append(answer.chosen.deployment.num_devices)
    assert costs == sorted(costs)
    assert costs[0] == 2 < costs[-1]


def test_a_rate_beyond_the_cluster_gets_the_highest_goodput() -> None:
    answer = ask(problem(3, rate=1000.0))
    assert not answer.met
    assert answer.chosen is not None
    assert 0 < (answer.chosen.goodput or 0) < 1000


def test_phases_may_have_devices_of_different_types() -> None:
    question = problem(1, more=[NodeSection(device=H100, devices=1, nic_gbits_per_s=400)], affinity="high")
    deployment = ask(question).chosen.deployment  # type: ignore[union-attr]
    assert deployment.devices == {A100: 1, H100: 1}


def test_one_device_needs_a_colocated_instance() -> None:
    answer = ask(problem(1, layouts=("disaggregated", "colocated", "mixed")))
    assert answer.chosen is not None
    assert answer.chosen.deployment.layout == "colocated"


def test_every_configured_layout_is_evaluated() -> None:
    answer = ask(problem(4, layouts=("disaggregated", "colocated")))
    assert {evaluated.deployment.layout for evaluated in answer.search.evaluated} == {"disaggregated", "colocated"}


def test_a_mixture_on_different_devices_serves_more_than_one_layout() -> None:
    more = [NodeSection(device=H100, devices=1)]
    alone = goodput(problem(2, more=more, max_tp=1, layouts=("disaggregated", "colocated")))
    answer = ask(problem(2, more=more, max_tp=1, layouts=("disaggregated", "colocated", "mixed")))
    assert answer.chosen is not None
    assert answer.chosen.deployment.layout == "mixed"
    assert answer.chosen.goodput is not None
    assert answer.chosen.goodput > alone


def test_a_mixture_can_be_cheaper() -> None:
    def cheapest(*layouts: Layout) -> tuple[Layout, float]:
        more = [NodeSection(device=H100, devices=3)]
        question = problem(4, more=more, max_tp=1, rate=110.0, layouts=layouts)
        answer = ask(question)
        assert answer.met
        assert answer.chosen is not None
        assert answer.chosen.goodput == 110.0
        return answer.chosen.deployment.layout, question.price_per_hour(answer.chosen.deployment.devices)

    layout, price = cheapest("disaggregated", "colocated", "mixed")
    assert layout == "mixed"
    assert price < cheapest("disaggregated", "colocated")[1]


def two_stages(devices: int, nodes: int, *, only_served: bool = True, affinity: str = "auto") -> Problem:
    """Instances may have two stages, and divide no layer."""
    asked = problem(devices, nodes, layouts=("disaggregated", "colocated"), max_tp=1, affinity=affinity)
    section = asked.section.model_copy(update={"max_pp": 2, "only_served": only_served})
    return replace(asked, section=section)


def test_only_what_can_be_served_is_planned() -> None:
    """Where KV is to stay inside nodes, instances are on one: served, rank 0 sends the KV of all nodes."""
    for only_served in (True, False):
        space = search_space(two_stages(2, 2, only_served=only_served, affinity="low"), SerialMapper())
        spans = {each.span for each in space.deployments(space.problem.node_types) if each.same_node}
        assert spans == ({1} if only_served else {1, 2})


def test_a_model_larger_than_a_node_is_served_on_two() -> None:
    @dataclass(frozen=True)
    class LargeModel(ToySource):
        """Only two stages have room for it."""

        def kv_tokens(self, device: str, shape: ParallelShape) -> int:
            return self.tokens if shape.pp == 2 else 0

    asked = replace(two_stages(1, 4), source=LargeModel())
    assert asked.section.only_served
    chosen = ask(asked).chosen
    assert chosen is not None
    plan = plan_of(asked, chosen.deployment).model_copy(update={"model": str(BUILT_IN)})
    assert {group.shape for group in plan.groups} == {ParallelShape(pp=2)}
    assert serve_config_of(plan, Machine(cores=4, gpus=4, nodes=4)).kinds
    nodes = [node for ranks in planned_nodes(plan).of_process.values() for node, _ in ranks]
    assert sorted(nodes) == ["0", "1", "2", "3"][: len(nodes)], "one rank on each"


def test_a_plan_says_what_nobody_has_measured() -> None:
    """KV of prefill and decode instances of several GPUs is relayed; colocated instances hand over none."""
    space = search_space(problem(4, layouts=("disaggregated", "colocated")), SerialMapper())
    notes = {str(each): rank_notes(space, each) for each in space.deployments(space.problem.node_types)}
    for name, found in notes.items():
        relays = "tp2" in name and "prefill" in name
        assert [note.partition(" relays")[0] for note in found] == ["The first GPU of an instance"] * relays, name
    assert any(notes.values())
    assert not all(notes.values())


def test_a_plan_says_what_several_nodes_take_that_is_not_counted() -> None:
    asked = two_stages(1, 4)
    measured = calibration(shapes=(TP2.model_copy(update={"tp": 1, "pp": 2}),))
    asked = replace(asked, cluster=replace(asked.cluster, calibrations={A100: measured}))
    space = search_space(asked, SerialMapper())
    found = set()
    for each in space.deployments(space.problem.node_types):
        notes = " ".join(rank_notes(space, each))
        roles = {group.kind.role for group in each.groups if group.kind.shape.pp == 2}
        assert ("the steps of tp1pp2 count as on one node" in notes) == bool(roles)
        assert ("relays the KV of its ranks on other nodes" in notes) == bool(roles - {"colocated"})
        found.add(frozenset(roles))
    assert len(found) > 2

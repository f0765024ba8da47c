"""Shapes that are slower than smaller ones are not planned, and the plan says so."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tandem.core.config_file import dump_config
from tandem.core.cost_model import StepCost, StepLoad
from tandem.core.parallel import ParallelShape
from tandem.core.slo import SloClass
from tandem.core.slo_file import ClusterSection, NodeSection, SearchSection, SloFile, WorkloadSection
from tandem.placement.costs.calibration import Calibration, ShapeCalibration, load_calibration
from tandem.placement.costs.rank_messages import MessageCost
from tandem.placement.costs.resharding import KvShape, KvTransfer
from tandem.placement.planner import plan, problem_of
from tandem.placement.rank_notes import rank_notes
from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.kinds import InstanceKind, Kinds
from tandem.placement.search.mapper import SerialMapper
from tandem.placement.search.slower_shapes import without_slower_shapes
from tandem.placement.search.space import search_space
from tests.placement.search.problems import requests
from tests.placement.test_cluster import write_calibration

ONE, TP2, PP2 = ParallelShape(), ParallelShape(2), ParallelShape(1, 2)
BUILT_IN = Path(__file__).parents[3] / "models" / "tiny-python"


@dataclass(frozen=True)
class Cost:
    """Seconds of a prompt's token, and of a decode step; a prompt's step leaves room for the next after `interval` of
    it."""

    prompt_s: float
    decode_s: float
    interval: float = 1.0

    def step(self, load: StepLoad) -> StepCost:
        total_s = self.prompt_s * load.prefill_tokens + (self.decode_s if load.decode_sequences else 0.0)
        share = 1.0 if load.decode_sequences else self.interval
        return StepCost(linear_s=total_s, interval_s=share * total_s)

    def decode_coefficients(self, sequences: int) -> tuple[float, float]:
        return self.decode_s, 0.0


def kinds_of(*shapes: tuple[ParallelShape, Cost, int]) -> Kinds:
    def of_role(role: str) -> tuple[InstanceKind, ...]:
        return tuple(
            InstanceKind(role, "cpu", shape, kv_tokens, 512, 16, cost=cost)  # type: ignore[arg-type]
            for shape, cost, kv_tokens in shapes
        )

    return Kinds(of_role("prefill"), of_role("decode"), of_role("colocated"), ())


def shapes_of(kinds: Sequence[InstanceKind]) -> list[ParallelShape]:
    return [kind.shape for kind in kinds]


def test_a_shape_that_is_slower_in_both_phases_is_left_out_of_all_roles() -> None:
    kinds = without_slower_shapes(kinds_of((ONE, Cost(1e-4, 0.01), 1000), (TP2, Cost(1.2e-4, 0.028), 2000)), requests())
    assert shapes_of(kinds.prefill) == shapes_of(kinds.decode) == shapes_of(kinds.colocated) == [ONE]
    (slower,) = kinds.slower
    assert str(slower) == "tp2 on cpu"
    assert slower.reason.startswith("slower than tp1 here: a prompt of ")
    assert "takes 1.20 times as long and a decode step takes 2.80 times as long" in slower.reason


def test_a_shape_that_is_slower_in_one_phase_is_left_out_of_that_one() -> None:
    kinds = without_slower_shapes(kinds_of((ONE, Cost(1e-4, 0.01), 1000), (TP2, Cost(0.6e-4, 0.028), 2000)), requests())
    assert shapes_of(kinds.prefill) == shapes_of(kinds.colocated) == [ONE, TP2]
    assert shapes_of(kinds.decode) == [ONE]
    (slower,) = kinds.slower
    assert (str(slower), slower.reason) == (
        "decode tp2 on cpu",
        "slower than tp1 here: a decode step takes 2.80 times as long",
    )


@pytest.mark.parametrize(
    ("cost", "kv_tokens"),
    [
        pytest.param(Cost(0.6e-4, 0.008), 2000, id="faster"),
        pytest.param(Cost(1.2e-4, 0.028), 3000, id="more memory for KV on each device"),
        pytest.param(Cost(1.2e-4, 0.028, interval=0.3), 2000, id="more prompts at a time"),
    ],
)
def test_a_shape_with_an_advantage_stays(cost: Cost, kv_tokens: int) -> None:
    kinds = without_slower_shapes(kinds_of((ONE, Cost(1e-4, 0.01), 1000), (TP2, cost, kv_tokens)), requests())
    assert TP2 in shapes_of(kinds.prefill)
    assert TP2 in shapes_of(kinds.colocated)


def test_one_rank_alone_is_never_left_out() -> None:
    alone = kinds_of((TP2, Cost(1e-4, 0.01), 1000))
    assert without_slower_shapes(alone, requests()) == replace(alone, slower=())


# --- with a calibration ----------------------------------------------------------------------------------------------


def slo_file(tmp_path: Path, *, prompts: float, decode: float, devices: int = 2, **search: object) -> SloFile:
    """A node with a calibration in which two ranks take so many times as long as one."""
    path = write_calibration(tmp_path / "calibration.yaml")
    one = load_calibration(path)
    path.write_text(dump_config(with_two_ranks(one, prompts, decode)))
    return SloFile(
        model=str(BUILT_IN),
        cluster=ClusterSection(nodes=(NodeSection(device="cpu", devices=devices, calibration=path),)),
        slo=(SloClass(ttft_s=0.1, tpot_s=0.005),),
        workload=WorkloadSection(dataset="sharegpt", length_scale=0.25, max_total_tokens=1000),
        search=SearchSection.model_validate({"requests": 100, **search}),
    )


def with_two_ranks(one: Calibration, prompts: float, decode: float) -> Calibration:
    def shape(tp: int, pp: int) -> ShapeCalibration:
        return ShapeCalibration(
            tp=tp, pp=pp, kv_bytes_per_token=one.kv_bytes_per_token / 2, terms=terms, error=one.error
        )

    (first, first_s), *others = one.terms.linear
    terms = one.terms.model_copy(
        update={"linear": ((first, decode * first_s), *((n, prompts * seconds) for n, seconds in others))}
    )
    transfers = tuple(
        KvTransfer(source=source, destination=KvShape(), cost=MessageCost(latency_s=1e-3, bytes_per_s=rate))
        for source, rate in ((KvShape(), 4e9), (KvShape(tp=2), 2e9))
    )
    return one.model_copy(update={"shapes": (shape(2, 1), shape(1, 2)), "transfers": transfers})


def test_a_plan_says_that_two_ranks_are_slower_here_and_does_not_choose_them(tmp_path: Path) -> None:
    asked = slo_file(tmp_path, prompts=3.0, decode=2.8, layouts=("disaggregated",), max_tp=2, max_pp=2)
    planned = plan(asked, workers=1)
    assert planned.plan.groups
    assert {group.shape for group in planned.plan.groups} == {ONE}
    tp2, pp2 = planned.plan.notes
    assert tp2.startswith("On cpu, tp2 is slower than tp1 here: a prompt of ")
    assert re.search(r"a decode step takes 2\.7\d times as long, so no instance has this shape\.$", tp2)
    assert "tp1pp2 is slower than tp1" in pp2
    rejected = {candidate.description: candidate.reason for candidate in planned.evidence.candidates}
    assert rejected["tp2 on cpu"].startswith("slower than tp1 here")


def test_two_ranks_that_are_faster_are_candidates_and_kv_between_shapes_has_its_price(tmp_path: Path) -> None:
    problem = problem_of(slo_file(tmp_path, prompts=0.5, decode=0.6, devices=3, max_tp=2, max_pp=1))
    space = search_space(problem, SerialMapper())
    assert shapes_of(space.kinds.prefill) == [ONE, TP2]
    assert space.kinds.slower == ()
    prefill = next(kind for kind in space.kinds.prefill if kind.shape == TP2)
    decode = next(kind for kind in space.kinds.decode if kind.shape == ONE)
    deployment = CandidateDeployment((InstanceGroup(prefill, 1), InstanceGroup(decode, 1)))
    steps, note = rank_notes(space, deployment)
    assert re.match(r"On cpu, beside one rank, with tp2 a prompt of \d+ tokens takes 0\.5\d times as long and ", steps)
    assert note == "KV from tp2 to tp1 takes 2.00 times as long for each byte as between instances of one rank."

"""Whatever the problem: more devices, or a looser SLO, never lower the goodput that a search finds.

The search does not promise it by construction (`find_max_rate` ends at the first rate that fails, and smaller
improvements are not looked for), so the problems are drawn: a few, the same each time, and many with `make test-slow`.
"""

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.core.slo import SloClass
from tandem.core.slo_file import Layout
from tandem.placement.planner import search
from tandem.placement.search.mapper import SerialMapper
from tests.placement.search.problems import ToySource, problem

FEW = settings(max_examples=3, derandomize=True, database=None, deadline=None)
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Question:
    devices: int
    nodes: int
    slo: SloClass
    tokens: int
    layouts: tuple[Layout, ...]

    def goodput(self, *, devices: int = 0, nodes: int = 0, slo: SloClass | None = None) -> float:
        asked = problem(
            self.devices + devices,
            self.nodes + nodes,
            slo=slo or self.slo,
            layouts=self.layouts,
            source=ToySource(self.tokens),
        )
        evaluated = search(asked, SerialMapper(), lambda share, text: None).chosen
        return 0.0 if evaluated is None else evaluated.goodput or 0.0


SLOS = st.builds(
    lambda ttft_s, tpot_s, attainment: SloClass(ttft_s=ttft_s, tpot_s=tpot_s, attainment=attainment),
    st.sampled_from([0.1, 0.15, 0.2, 0.3, 0.5]),
    st.sampled_from([0.012, 0.02, 0.03, 0.05]),
    st.sampled_from([0.8, 0.9, 0.95]),
)
QUESTIONS = st.builds(
    Question,
    devices=st.integers(2, 6),
    nodes=st.integers(1, 2),
    slo=SLOS,
    tokens=st.sampled_from([5_000, 15_000, 40_000]),
    layouts=st.sampled_from([("disaggregated",), ("disaggregated", "colocated")]),
)
LOOSER = st.tuples(st.sampled_from(["ttft_s", "tpot_s", "attainment"]), st.sampled_from([1.05, 1.2, 2.0]))
MORE = st.sampled_from(["devices", "nodes"])


def check_looser(question: Question, looser: tuple[str, float]) -> None:
    field, factor = looser
    value = getattr(question.slo, field)
    loose = question.slo.model_copy(update={field: value / factor if field == "attainment" else value * factor})
    assert question.goodput(slo=loose) >= question.goodput()


def check_more(question: Question, more: str) -> None:
    assert question.goodput(**{more: 1}) >= question.goodput()


@FEW
@given(question=QUESTIONS, looser=LOOSER)
def test_a_looser_slo_never_lowers_the_goodput(question: Question, looser: tuple[str, float]) -> None:
    check_looser(question, looser)


@FEW
@given(question=QUESTIONS, more=MORE)
def test_more_devices_never_lower_the_goodput(question: Question, more: str) -> None:
    check_more(question, more)


@pytest.mark.slow
@pytest.mark.timeout(900)
@MANY
@given(question=QUESTIONS, looser=LOOSER)
def test_a_looser_slo_never_lowers_the_goodput_of_many(question: Question, looser: tuple[str, float]) -> None:
    check_looser(question, looser)


@pytest.mark.slow
@pytest.mark.timeout(900)
@MANY
@given(question=QUESTIONS, more=MORE)
def test_more_devices_never_lower_the_goodput_of_many(question: Question, more: str) -> None:
    check_more(question, more)

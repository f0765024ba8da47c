"""The fast models of each phase, compared with queues of known solution and with the simulator."""

import numpy as np
import pytest

from tandem.core.cost_model import StepLoad
from tandem.core.parallel import ParallelShape
from tandem.placement.search import colocated_model, prefill_model
from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.colocated_model import colocated_latencies_s
from tandem.placement.search.decode_model import decode_time_s, steps_until
from tandem.placement.search.group_attainment import AttainmentKey, group_attainment
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.limits import limit_of
from tandem.placement.search.mapper import SerialMapper
from tandem.placement.search.prefill_model import StepTimes, prefill_ttft_s
from tandem.placement.search.space import search_space
from tandem.placement.search.trial import simulate_at
from tandem.placement.workload.requests import Floats
from tests.placement.search.problems import SLO, ToyCost, problem

COST = ToyCost(1.0)


def test_a_single_prompt_does_not_wait() -> None:
    ttft_s = prefill_ttft_s(StepTimes(COST), np.array([0.0, 5.0]), [100, 300], instances=1, max_batch_tokens=512)
    assert ttft_s == pytest.approx([COST.step(StepLoad.of_prompts(n)).total_s for n in (100, 300)])


def test_prefill_is_an_m_d_1_queue() -> None:
    """Equal prompts, one in a step: the mean wait is R D^2 / (2 (1 - R D))."""
    rng = np.random.default_rng(1)
    service_s = COST.step(StepLoad.of_prompts(450)).total_s
    rate = 0.6 / service_s
    arrival_s = np.cumsum(rng.exponential(1 / rate, 40_000))
    ttft_s = prefill_ttft_s(StepTimes(COST), arrival_s, [450] * 40_000, instances=1, max_batch_tokens=450)
    assert ttft_s.mean() == pytest.approx(service_s + rate * service_s**2 / (2 * (1 - 0.6)), rel=0.05)


def test_a_long_prompt_takes_several_steps() -> None:
    (ttft_s,) = prefill_ttft_s(StepTimes(COST), np.array([0.0]), [1000], instances=1, max_batch_tokens=400)
    assert ttft_s == pytest.approx(3 * 5e-3 + 1000 * 1e-4)


def test_a_single_sequence_decodes_step_by_step() -> None:
    kind = InstanceKind("decode", "A", ParallelShape(), 10_000, 512, 8, cost=COST)
    (time_s,) = decode_time_s(kind, np.array([0.0]), [100], [11], instances=1)
    steps = [COST.step(StepLoad.of_decode(1, 101 + k)).total_s for k in range(10)]
    assert time_s == pytest.approx(sum(steps))


def test_a_sequence_waits_for_memory() -> None:
    """Both sequences do not fit together: the second one starts when the first one has finished."""
    kind = InstanceKind("decode", "A", ParallelShape(), 150, 512, 8, cost=COST)
    first_s, second_s = decode_time_s(kind, np.array([0.0, 0.0]), [100, 100], [11, 11], instances=1)
    assert second_s == pytest.approx(2 * first_s)


@pytest.mark.parametrize("growth_s", [0.0, 1e-3])
def test_steps_until_is_the_smallest_sufficient_number(growth_s: float) -> None:
    for time_s in (0.001, 0.01, 0.015, 0.5, 2.0):
        count = int(steps_until(time_s, 0.01, growth_s))
        taken = [0.01 * n + growth_s * n * (n - 1) / 2 for n in (count - 1, count)]
        assert taken[1] >= time_s - 1e-9
        assert count == 1 or taken[0] < time_s + 1e-9


@pytest.mark.parametrize("rate", [10.0, 20.0])
def test_the_fast_models_agree_with_the_simulator(rate: float) -> None:
    question = problem(4)
    space = search_space(question, SerialMapper())
    prefill = next(kind for kind in space.kinds.prefill if kind.num_devices == 1)
    decode = next(kind for kind in space.kinds.decode if kind.num_devices == 1)
    deployment = CandidateDeployment((InstanceGroup(prefill, 2), InstanceGroup(decode, 2)))
    _, evaluation = simulate_at(question, deployment, rate)
    product = 1.0
    for group in deployment.groups:
        key = AttainmentKey.of(group.kind, 2, space.limits[group.kind].rate, 0.0, len(question.computed))
        attainment = group_attainment(
            key, stream=question.computed, classes=(SLO.model_copy(update={"attainment": 0.3}),)
        )
        product *= float(attainment.at(rate / 2)[0])
    assert product == pytest.approx(evaluation.classes[0].attainment, abs=0.04)


def test_no_attainment_beyond_the_limit() -> None:
    question = problem(2)
    space = search_space(question, SerialMapper())
    for kind in (*space.kinds.prefill, *space.kinds.decode):
        limit = limit_of(kind, (SLO,), question.requests)
        key = AttainmentKey.of(kind, 1, 2 * limit.rate, 0.0, len(question.computed))
        attainment = group_attainment(key, stream=question.requests, classes=(SLO,))
        assert attainment.rates[attainment.shares[:, 0] >= SLO.attainment].max() <= 1.1 * limit.rate


def test_chunks_of_a_long_prompt_cost_what_single_steps_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step times of the toy are affine, so the closed forms are exact."""
    rng = np.random.default_rng(2)
    arrival_s, prompts = np.cumsum(rng.exponential(0.4, 60)), rng.integers(100, 4000, 60).tolist()
    outputs = rng.integers(2, 60, 60).tolist()
    kind = InstanceKind("colocated", "A", ParallelShape(), 40_000, 256, 16, cost=COST)

    def latencies() -> tuple[Floats, ...]:
        prefill = prefill_ttft_s(StepTimes(COST), arrival_s, prompts, instances=2, max_batch_tokens=256)
        return prefill, *colocated_latencies_s(kind, arrival_s, prompts, outputs, instances=2)

    together = latencies()
    for model in (colocated_model, prefill_model):
        monkeypatch.setattr(model, "_MIN_FULL_CHUNKS", 1 << 30)
    for at_once, single in zip(together, latencies(), strict=True):
        np.testing.assert_allclose(at_once, single, rtol=1e-9)

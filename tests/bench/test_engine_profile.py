"""What is made of a measured cluster's answers."""

import pytest

from bench.engine_profile import Cell, Part, grid
from bench.pace import Pace
from bench.serving_fit import (
    Answers,
    Decoded,
    Prompted,
    decode_pace,
    prefill_pace,
    served_decode,
    served_prompts,
    served_prompts_beside,
)
from core.cost_model import StepLoad
from placement.costs.calibration import CalibratedCost, Terms
from placement.costs.serving import ServingCosts

TERMS = Terms(
    linear=((1, 0.010), (256, 0.300)),
    attention_per_pair=0.0,
    kv_read=((1, 1e-6),),
    kv_per_sequence=0.0,
    head=0.0,
    head_per_sampled=0.0,
)
ALONE = CalibratedCost(TERMS)  # the engine by itself


def prompted(
    num_tokens: int, prefill_s: float, transfer_s: float = 0.0, began_s: float = 0.0, paused_s: float = 0.0
) -> Prompted:
    parts = {"admission_s": 0.001, "dispatch_s": 0.0005, "prefill_queue_s": 0.0025, "prefill_s": prefill_s}
    ttft_s = sum(parts.values())
    return Prompted(
        num_tokens=num_tokens,
        paused_s=paused_s,
        began_s=began_s,
        first_s=ttft_s + 0.002,
        whole_s=ttft_s + 0.003,
        ttft_s=ttft_s,
        total_s=ttft_s,
        parts=parts | {"transfer_s": transfer_s},
    )


def test_serving_adds_a_constant_and_a_factor_to_prompts() -> None:
    prompts = [prompted(n, 0.003 + 1.2 * ALONE.step(StepLoad.of_prompts(n)).total_s) for n in (32, 64, 256)]
    served = served_prompts(ALONE, prompts)
    assert served.constant_s == pytest.approx(0.003)
    assert served.factor == pytest.approx(1.2)
    cost = CalibratedCost(TERMS, ServingCosts(prefill_beside=served))
    assert prefill_pace(cost, prompts) == pytest.approx(1.0), "what was measured is what is predicted"


def test_the_first_step_after_a_pause_takes_longer() -> None:
    prompts = [
        prompted(n, 0.003 + 1.2 * ALONE.step(StepLoad.of_prompts(n)).total_s + wake_s, paused_s=paused_s)
        for n in (32, 64, 256)
        for paused_s, wake_s in ((0.0, 0.0), (0.01, 0.0), (0.2, 0.005))
    ]
    served, wake_s = served_prompts_beside(ALONE, prompts)
    assert (served.constant_s, served.factor, wake_s) == pytest.approx((0.003, 1.2, 0.005))


def step_s(batch: int) -> float:
    base_s, per_token_s = ALONE.decode_line(batch)
    return base_s + batch * 100 * per_token_s


def alone_for(batch: int, taken_s: float) -> Decoded:
    """Ten steps of an answer for each of so many clients, all at the same time."""
    return Decoded(batch, 100.0, 10 * batch, ((0.0, 10 * taken_s),) * batch)


def test_serving_adds_a_constant_and_a_factor_to_decode() -> None:
    served = served_decode(ALONE, [alone_for(batch, 0.002 + 1.5 * step_s(batch)) for batch in (1, 2, 8)])
    assert served.constant_s == pytest.approx(0.002)
    assert served.factor == pytest.approx(1.5)


def test_decode_is_compared_with_as_many_at_once_as_there_were() -> None:
    # Two answers of ten steps; for five of them they are together, and every step takes 1.5 times as long as predicted.
    alone_s, both_s = 5 * 1.5 * step_s(1), 5 * 1.5 * step_s(2)
    first = (0.0, alone_s + both_s)
    second = (alone_s, alone_s + both_s + alone_s)
    assert decode_pace(ALONE, Decoded(2, 100.0, 20, (first, second))) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("start_s", "end_s", "busy"), [(0.5, 2.5, True), (0.0, 3.0, True), (2.5, 3.1, False), (3.5, 4.5, False)]
)
def test_decode_is_busy_while_there_is_any_answer(start_s: float, end_s: float, busy: bool) -> None:
    assert Decoded(2, 1.0, 1, ((4.0, 5.0), (1.0, 3.0), (0.0, 2.0))).is_busy(start_s, end_s) is busy


def test_a_transfer_has_a_latency_a_speed_and_a_turn() -> None:
    """Alone: 4 ms and 10 us a token, of which 1 ms is its turn. Beside decode, whose steps take 20 ms: 6 ms and a turn
    for each of the transfers of one step."""
    alone = [prompted(n, 0.1, transfer_s=0.004 + n * 1e-5) for n in (32, 32, 64, 160, 256)]
    beside = [
        prompted(n, 0.1, transfer_s=0.006 + together * 0.001 + n * 1e-5 + 0.010, began_s=began_s)
        for began_s, together in ((1.0, 1), (2.0, 3), (3.0, 2))
        for n in (32, 64, 160)[:together]
    ]
    answers = Answers(
        prompted_alone=alone,
        carried_beside=[(beside, Decoded(1, 100.0, 10, ((0.0, 0.2),)))],
    )
    road = answers.road(kv_bytes_per_token=12288.0)
    assert road.transfer_alone_s == pytest.approx(0.003)
    assert road.transfer_beside_s == pytest.approx(0.006)
    assert road.transfer_turn_s == pytest.approx(0.001)
    assert road.transfer_bytes_per_s == pytest.approx(12288.0 / 1e-5)
    assert road.admission_s == pytest.approx(0.004), "until the step began, less what waits for the answer"
    assert road.first_token_s == pytest.approx(0.002)
    assert road.token_s == pytest.approx(0.003)


def test_transfers_that_do_not_grow_with_the_prompt_are_endlessly_fast_but_finite() -> None:
    alone = [prompted(n, 0.1, transfer_s=0.01 - n * 1e-6) for n in (32, 64, 160, 256)]
    carried = [([prompted(32, 0.1, transfer_s=0.02)], Decoded(1, 100.0, 10, ((0.0, 0.2),)))]
    answers = Answers(prompted_alone=alone, carried_beside=carried)
    assert 0 < answers.road(kv_bytes_per_token=12288.0).transfer_bytes_per_s < float("inf")


def test_what_was_measured_too_shortly_is_not_fitted() -> None:
    decoded = Decoded(1, 100.0, 10, ((0.0, 0.2),))
    one = prompted(32, 0.1)
    assert Answers(prompted_beside=[one], carried_beside=[([], decoded), ([one], decoded)]).is_enough
    assert not Answers(prompted_beside=[one], carried_beside=[([], decoded)]).is_enough
    assert not Answers(carried_beside=[([one], decoded)]).is_enough


@pytest.mark.parametrize(("prefill", "decode", "usual"), [(1.05, 0.95, True), (1.07, 1.0, False), (1.0, 0.93, False)])
def test_a_machines_pace_is_compared_with_its_calibration(prefill: float, decode: float, usual: bool) -> None:
    assert Pace(prefill, decode).is_usual(0.06) is usual


def test_a_cells_load_is_what_the_engine_is_given() -> None:
    cell = Cell(prompts=(Part(8), Part(4, start=16, draws=False)), decodes=(Part(1, 31), Part(1, 15)))
    assert cell.load == StepLoad(
        prefill_tokens=12,
        prefill_sequences=2,
        prefill_pairs=36 + 4 * 16 + 10,
        prefill_kv_tokens=28,
        decode_sequences=2,
        decode_kv_tokens=48,
        sampled=3,
    )
    assert cell.blocks(16) == 1 + 2 + 2 + 1


def test_the_grid_keeps_to_the_instances_limits_and_holds_some_of_each_kind_out() -> None:
    cells = grid(max_batch_tokens=512, max_batch=16, max_model_len=600)
    for cell in cells:
        assert cell.load.prefill_tokens <= 512
        assert cell.load.decode_sequences <= 16
        assert all(part.start + part.num_tokens < 600 for part in (*cell.prompts, *cell.decodes))
    for is_kind in (
        lambda cell: not cell.decodes,
        lambda cell: not cell.prompts,
        lambda cell: cell.prompts and cell.decodes,
    ):
        assert {cell.held_out for cell in cells if is_kind(cell)} == {True, False}

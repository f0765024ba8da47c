"""What is made of a measured cluster's answers."""

import pytest

from bench.engine_profile import Cell, Part, grid
from bench.serving_profile import Decoded, Prompted, decode_factors, prefill_factor, road_costs
from core.cost_model import StepLoad
from placement.costs.calibration import CalibratedCost, Terms

ALONE = CalibratedCost(
    Terms(
        linear=((1, 0.010), (256, 0.300)),
        attention_per_pair=0.0,
        kv_read=((1, 1e-6),),
        kv_per_sequence=0.0,
        head=0.0,
        head_per_sampled=0.0,
    )
)


def prompted(num_tokens: int, prefill_s: float, transfer_s: float = 0.0) -> Prompted:
    parts = {"admission_s": 0.001, "dispatch_s": 0.0005, "prefill_queue_s": 0.0025, "prefill_s": prefill_s}
    ttft_s = sum(parts.values())
    return Prompted(
        num_tokens=num_tokens,
        first_s=ttft_s + 0.002,
        whole_s=ttft_s + 0.003,
        ttft_s=ttft_s,
        total_s=ttft_s,
        parts=parts | {"transfer_s": transfer_s},
    )


def test_factors_are_what_serving_adds_to_the_engine() -> None:
    prompts = [prompted(n, 1.2 * ALONE.step(StepLoad.of_prompts(n)).total_s) for n in (32, 64, 256)]
    assert prefill_factor(ALONE, prompts) == pytest.approx(1.2)


def test_decode_is_compared_with_as_many_at_once_as_there_were() -> None:
    def step_s(batch: int) -> float:
        base_s, per_token_s = ALONE.decode_line(batch)
        return base_s + batch * 100 * per_token_s

    # Two answers of ten steps; for five of them they are together, and every step takes 1.5 times as long as predicted.
    alone_s, both_s = 5 * 1.5 * step_s(1), 5 * 1.5 * step_s(2)
    first = (0.0, alone_s + both_s)
    second = (alone_s, alone_s + both_s + alone_s)
    (known,) = decode_factors(ALONE, [Decoded(2, 100.0, 10, (first, second))])
    assert known == (2, pytest.approx(1.5))


def test_a_transfer_has_a_latency_and_a_speed() -> None:
    carried = [prompted(n, 0.1, transfer_s=0.004 + n * 1e-5) for n in (32, 32, 64, 160, 256)]
    road = road_costs([prompted(32, 0.1)], carried, kv_bytes_per_token=12288.0)
    assert road.transfer_latency_s == pytest.approx(0.004)
    assert road.transfer_bytes_per_s == pytest.approx(12288.0 / 1e-5)
    assert road.admission_s == pytest.approx(0.004), "until the step began, less what waits for the answer"
    assert road.first_token_s == pytest.approx(0.002)
    assert road.token_s == pytest.approx(0.003)


def test_transfers_that_do_not_grow_with_the_prompt_are_endlessly_fast_but_finite() -> None:
    carried = [prompted(n, 0.1, transfer_s=0.01 - n * 1e-6) for n in (32, 64, 160, 256)]
    road = road_costs([prompted(32, 0.1)], carried, kv_bytes_per_token=12288.0)
    assert 0 < road.transfer_bytes_per_s < float("inf")


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

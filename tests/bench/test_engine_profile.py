"""What the engine is measured with."""

from bench.engine_profile import Cell, Part, grid
from tandem.core.cost_model import StepLoad


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

"""What the engine is measured with."""

from tandem.core.cost_model import StepLoad
from tandem.profiling.engine_profile import CellSequence, ProfileCell, profile_grid


def test_a_cells_load_is_what_the_engine_is_given() -> None:
    prompts = CellSequence(8), CellSequence(4, start=16, is_sampled=False)
    cell = ProfileCell(prompts, decodes=(CellSequence(1, 31), CellSequence(1, 15)))
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
    cells = profile_grid(max_batch_tokens=512, max_batch=16, max_model_len=600)
    for cell in cells:
        assert cell.load.prefill_tokens <= 512
        assert cell.load.decode_sequences <= 16
        assert all(sequence.start + sequence.num_tokens < 600 for sequence in cell.sequences)
    for is_kind in (
        lambda cell: not cell.decodes,
        lambda cell: not cell.prompts,
        lambda cell: cell.prompts and cell.decodes,
    ):
        assert {cell.held_out for cell in cells if is_kind(cell)} == {True, False}

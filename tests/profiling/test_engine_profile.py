"""What the engine is measured with."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest

from tandem.core.clock import ManualClock
from tandem.core.cost_model import StepLoad
from tandem.core.kv_layout import KvLayout
from tandem.engine.engine import Engine
from tandem.engine.step import SequenceSlice
from tandem.profiling import engine_profile
from tandem.profiling.engine_profile import CellSequence, EngineProfiler, ProfileCell, following_cells, profile_grid
from tests.fakes import LAYOUT


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


def test_steps_that_follow_each_other_draw_a_token_each_and_have_something_held_out() -> None:
    cells = following_cells(profile_grid(max_batch_tokens=512, max_batch=64, max_model_len=2000))
    assert all(cell.load.sampled == len(cell.sequences) for cell in cells)
    for is_kind in (lambda cell: not cell.decodes, lambda cell: not cell.prompts):
        of_kind = [cell for cell in cells if is_kind(cell)]
        assert {cell.held_out for cell in of_kind} == {True, False}
        assert max(cell.load.tokens for cell in of_kind if not cell.held_out) in (64, 512)


@dataclass
class CountingEngine:
    """Counts steps under way. The tenth of a second after which a cell is left is over at once."""

    num_stages: int
    clock: ManualClock
    under_way: list[set[int]] = field(default_factory=list)
    most: int = 0
    layout: KvLayout = LAYOUT
    spec: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(vocab_size=100))

    def launch(self, slices: list[SequenceSlice]) -> None:
        blocks = {block for part in slices for block in part.block_table}
        assert all(not blocks & others for others in self.under_way), "steps under way are of other sequences"
        self.under_way.append(blocks)
        self.most = max(self.most, len(self.under_way))
        self.clock.advance(0.01)

    def collect(self, handle: None) -> None:
        self.under_way.pop(0)
        self.clock.advance(0.002)


def test_a_step_is_in_every_stage_while_their_interval_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    monkeypatch.setattr(engine_profile.time, "perf_counter", clock.now_s)
    engine = CountingEngine(3, clock)
    cells = [ProfileCell(prompts=(CellSequence(8),)), ProfileCell(decodes=(CellSequence(1, 20),) * 20)]
    (measured,) = EngineProfiler(cast(Engine, engine)).measure_following(cells, 1.0)
    assert measured.seconds == pytest.approx(0.012)
    assert measured.prefill_tokens == 8, "the pool does not hold three steps of the other cell"
    assert (engine.most, engine.under_way) == (3, [])


@dataclass
class SharedCore:
    """Steps of a sequence take 10 ms, and twice as long in the 0.6 s of each second in which a neighbour computes."""

    clock: ManualClock
    layout: KvLayout = LAYOUT
    spec: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(vocab_size=100))

    def step(self, slices: list[SequenceSlice]) -> None:
        is_disturbed = self.clock.now_s() % 1.0 < 0.6
        self.clock.advance(0.01 * len(slices) * (2 if is_disturbed else 1))

    def settle(self) -> None: ...


def test_a_neighbour_that_comes_and_goes_is_in_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    monkeypatch.setattr(engine_profile.time, "perf_counter", clock.now_s)
    cells = [ProfileCell(decodes=(CellSequence(1, 15),) * count) for count in (1, 2, 4)]
    measured = EngineProfiler(cast(Engine, SharedCore(clock))).measure(cells, 12.0)
    assert [one.seconds for one in measured] == pytest.approx([0.01, 0.02, 0.04])

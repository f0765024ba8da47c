"""Measures the engine's steps over a grid of loads, as a worker would run them: its loader, its pool, its threads."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

import torch

from tandem.core.config import EngineSection
from tandem.core.cost_model import StepLoad, attention_pairs
from tandem.core.request import SamplingParams
from tandem.engine.engine import Engine
from tandem.engine.step import SampleRequest, SequenceSlice
from tandem.placement.costs.calibration import Measurement
from tandem.worker.engine_setup import load_worker_engine

_MAX_CELL_S = 8.0  # a cell that would take longer, to judge from the one before it, is left out
_LEAST_ROUNDS = 3
_BURST_S = 0.1
_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence in a step: `num_tokens` new tokens after `start`. A decoding one has one. `draws` a token or not."""

    num_tokens: int
    start: int = 0
    draws: bool = True


@dataclass(frozen=True, slots=True)
class Cell:
    """One step to be measured."""

    prompts: tuple[Part, ...] = ()
    decodes: tuple[Part, ...] = ()
    held_out: bool = False

    @property
    def load(self) -> StepLoad:
        return StepLoad(
            prefill_tokens=sum(part.num_tokens for part in self.prompts),
            prefill_sequences=len(self.prompts),
            prefill_pairs=sum(attention_pairs(part.start, part.num_tokens) for part in self.prompts),
            prefill_kv_tokens=sum(part.start + part.num_tokens for part in self.prompts),
            decode_sequences=len(self.decodes),
            decode_kv_tokens=sum(part.start + 1 for part in self.decodes),
            sampled=sum(part.draws for part in (*self.prompts, *self.decodes)),
        )

    def blocks(self, block_size: int) -> int:
        return sum(-(-(part.start + part.num_tokens) // block_size) for part in (*self.prompts, *self.decodes))


def grid(max_batch_tokens: int, max_batch: int, max_model_len: int) -> list[Cell]:
    """Cells in order of size. Two sizes in each octave are fitted; what lies between them, and other shapes of equal
    size, is held out. Prompts: whole, several in a step, after a cached beginning, and without a draw. Decode: batches
    by context. Mixed: both in one step."""
    cells = [*_prompt_cells(max_batch_tokens), *_decode_cells(max_batch), *_mixed_cells()]
    fitting = [
        cell
        for cell in cells
        if cell.load.prefill_tokens <= max_batch_tokens
        and cell.load.decode_sequences <= max_batch
        and all(part.start + part.num_tokens < max_model_len for part in (*cell.prompts, *cell.decodes))
    ]
    return sorted(fitting, key=lambda cell: (cell.load.tokens, cell.load.prefill_pairs, cell.load.decode_kv_tokens))


def _prompt_cells(max_tokens: int) -> Iterator[Cell]:
    for octave in range(2, max_tokens.bit_length()):
        size = 1 << octave
        yield Cell(prompts=(Part(size),))
        yield Cell(prompts=(Part(size + size // 2),))
        yield Cell(prompts=(Part(size + size // 4),), held_out=True)
        if size in (64, 256):
            yield Cell(prompts=(Part(size // 4),) * 4)
            yield Cell(prompts=(Part(size, start=256),))
            yield Cell(prompts=(Part(size, draws=False),))
            yield Cell(prompts=(Part(size // 8), Part(size // 4), Part(size)), held_out=True)
        if size in (512, 1024, 2048):  # many rows and few pairs: which of the two takes the time
            yield Cell(prompts=(Part(size // 8),) * 8)


def _decode_cells(max_batch: int) -> Iterator[Cell]:
    for octave in range(max_batch.bit_length()):
        size = 1 << octave
        for batch in sorted({size, size + size // 2}):
            yield Cell(decodes=(Part(1, 32),) * batch)
            yield Cell(decodes=(Part(1, 256),) * batch)
        yield Cell(decodes=(Part(1, 1024),) * size)
        yield Cell(decodes=(Part(1, 128),) * size, held_out=True)
        if size >= 4:
            between = size + size // 4
            yield Cell(decodes=tuple(Part(1, 64 + 512 * i // between) for i in range(between)), held_out=True)


def _mixed_cells() -> Iterator[Cell]:
    for index, (batch, tokens) in enumerate(((4, 32), (8, 128), (16, 64), (32, 256))):
        yield Cell(prompts=(Part(tokens),), decodes=(Part(1, 256),) * batch, held_out=index % 2 == 1)


class EngineProfiler:
    """An engine that is loaded, and knows only how long its steps take."""

    def __init__(self, model: Path, section: EngineSection) -> None:
        """Raises CheckpointError or ConfigError."""
        self._engine, self._pool = load_worker_engine(model, section)
        self._draw = Random(0)
        # Numbers as after real prompts, and every page touched.
        for layer in self._engine.pool:
            layer.copy_(torch.randn(layer.shape[1:]).expand(layer.shape))

    @property
    def engine(self) -> Engine:
        return self._engine

    def measure(
        self, cells: Sequence[Cell], budget_s: float, progress: Callable[[float], None] = lambda share: None
    ) -> list[Measurement]:
        """Each cell at least once, then in turns, so that what disturbs the machine for a while spoils no median. The
        large ones get three rounds, and otherwise each as much of `budget_s` as any other.

        `cells` ascend in size. Those that the pool cannot hold, or that would take much too long, are left out.
        `progress` hears which share of the budget is used.
        """
        layout = self._engine.layout
        cells = [cell for cell in cells if cell.blocks(layout.block_size) <= layout.num_blocks]
        began_s = time.perf_counter()
        seconds: dict[int, list[float]] = {}
        for index, cell in enumerate(cells):
            if index and seconds[index - 1][0] * cell.load.tokens / cells[index - 1].load.tokens > _MAX_CELL_S:
                break  # all that follow are at least as large
            seconds[index] = self._times(cell)
            progress(min(1.0, (time.perf_counter() - began_s) / budget_s))
        while (used_s := time.perf_counter() - began_s) < budget_s:
            # The cell that has had the least time, of those with too few rounds if there are any.
            index = min(seconds, key=lambda index: (len(seconds[index]) >= _LEAST_ROUNDS, sum(seconds[index])))
            seconds[index] += self._times(cells[index])
            progress(min(1.0, used_s / budget_s))
        progress(1.0)
        return [
            Measurement(
                **_load_fields(cells[index].load),
                seconds=median(times),
                rounds=len(times),
                held_out=cells[index].held_out,
            )
            for index, times in seconds.items()
        ]

    def close(self) -> None:
        self._engine.close()

    def _times(self, cell: Cell) -> list[float]:
        """Of steps in a row, as a worker takes them: short ones find in the caches what the one before them left. The
        first of several does not count."""
        times = [self._time(cell)]
        while sum(times) < _BURST_S:
            times.append(self._time(cell))
        return times[1:] or times

    def _time(self, cell: Cell) -> float:
        """A step of new random tokens, every sequence in blocks of its own."""
        slices, block = [], 0
        for part in (*cell.decodes, *cell.prompts):
            end = part.start + part.num_tokens
            count = -(-end // self._engine.layout.block_size)
            tokens = [self._draw.randrange(self._engine.spec.vocab_size) for _ in range(part.num_tokens)]
            sample = SampleRequest(_GREEDY, end, (), part.start) if part.draws else None
            slices.append(SequenceSlice(tokens, part.start, range(block, block + count), sample))
            block += count
        began_s = time.perf_counter()
        self._engine.step(slices)
        return time.perf_counter() - began_s


def _load_fields(load: StepLoad) -> dict[str, int]:
    return {name: getattr(load, name) for name in StepLoad.__dataclass_fields__}

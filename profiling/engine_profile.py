"""Measures the engine's steps over a grid of loads, with the loader, KV pool and threads of a worker."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from random import Random

import numpy as np
import torch

from tandem.core.config import RanksSection
from tandem.core.cost_model import StepLoad, attention_pairs
from tandem.core.instance_section import EngineSection
from tandem.core.request import SamplingParams
from tandem.engine.engine import Engine
from tandem.engine.step import SampleRequest, SequenceSlice
from tandem.kv_transfer.pool import SharedPool
from tandem.placement.costs.step_fit import Measurement
from tandem.worker.engine_setup import load_worker_engine
from tandem.worker.ranks.group import RankGroup

_MAX_CELL_S = 8.0  # cells that would take longer, extrapolated from the previous one, are left out
_MIN_ROUNDS = 3
_BURST_S = 0.1
_QUANTILE = 0.25
_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class CellSequence:
    """One sequence in a step: `num_tokens` new tokens after `start` (1 if it decodes). `is_sampled`: draws a token."""

    num_tokens: int
    start: int = 0
    is_sampled: bool = True


@dataclass(frozen=True, slots=True)
class ProfileCell:
    """One step to measure. `held_out`: from the fit."""

    prompts: tuple[CellSequence, ...] = ()
    decodes: tuple[CellSequence, ...] = ()
    held_out: bool = False

    @property
    def sequences(self) -> tuple[CellSequence, ...]:
        return (*self.decodes, *self.prompts)

    @property
    def load(self) -> StepLoad:
        return StepLoad(
            prefill_tokens=sum(sequence.num_tokens for sequence in self.prompts),
            prefill_sequences=len(self.prompts),
            prefill_pairs=sum(attention_pairs(sequence.start, sequence.num_tokens) for sequence in self.prompts),
            prefill_kv_tokens=sum(sequence.start + sequence.num_tokens for sequence in self.prompts),
            decode_sequences=len(self.decodes),
            decode_kv_tokens=sum(sequence.start + 1 for sequence in self.decodes),
            sampled=sum(sequence.is_sampled for sequence in self.sequences),
        )

    def blocks(self, block_size: int) -> int:
        return sum(-(-(sequence.start + sequence.num_tokens) // block_size) for sequence in self.sequences)


def profile_grid(max_batch_tokens: int, max_batch: int, max_model_len: int) -> list[ProfileCell]:
    """Cells in order of size. Two sizes in each octave are fitted; sizes between them, and other shapes of equal size,
    are held out. Prompts: complete, several in a step, after a cached prefix, and without sampling. Decode: batches by
    context. Mixed: both in one step."""
    cells = [*_prompt_cells(max_batch_tokens), *_decode_cells(max_batch), *_mixed_cells()]
    fitting = [
        cell
        for cell in cells
        if cell.load.prefill_tokens <= max_batch_tokens
        and cell.load.decode_sequences <= max_batch
        and all(sequence.start + sequence.num_tokens < max_model_len for sequence in cell.sequences)
    ]
    return sorted(fitting, key=lambda cell: (cell.load.tokens, cell.load.prefill_pairs, cell.load.decode_kv_tokens))


def _prompt_cells(max_tokens: int) -> Iterator[ProfileCell]:
    for octave in range(2, max_tokens.bit_length()):
        size = 1 << octave
        yield ProfileCell(prompts=(CellSequence(size),))
        yield ProfileCell(prompts=(CellSequence(size + size // 2),))
        yield ProfileCell(prompts=(CellSequence(size + size // 4),), held_out=True)
        if size in (64, 256):
            yield ProfileCell(prompts=(CellSequence(size // 4),) * 4)
            yield ProfileCell(prompts=(CellSequence(size, start=256),))
            yield ProfileCell(prompts=(CellSequence(size, is_sampled=False),))
            yield ProfileCell(
                prompts=(CellSequence(size // 8), CellSequence(size // 4), CellSequence(size)), held_out=True
            )
        if size in (512, 1024, 2048):  # many rows and few attention pairs, to tell their costs apart
            yield ProfileCell(prompts=(CellSequence(size // 8),) * 8)


def _decode_cells(max_batch: int) -> Iterator[ProfileCell]:
    for octave in range(max_batch.bit_length()):
        size = 1 << octave
        for batch in sorted({size, size + size // 2}):
            yield ProfileCell(decodes=(CellSequence(1, 32),) * batch)
            yield ProfileCell(decodes=(CellSequence(1, 256),) * batch)
        yield ProfileCell(decodes=(CellSequence(1, 1024),) * size)
        yield ProfileCell(decodes=(CellSequence(1, 128),) * size, held_out=True)
        if size >= 4:
            between = size + size // 4
            yield ProfileCell(
                decodes=tuple(CellSequence(1, 64 + 512 * i // between) for i in range(between)), held_out=True
            )


def _mixed_cells() -> Iterator[ProfileCell]:
    for index, (batch, tokens) in enumerate(((4, 32), (8, 128), (16, 64), (32, 256))):
        yield ProfileCell(
            prompts=(CellSequence(tokens),), decodes=(CellSequence(1, 256),) * batch, held_out=index % 2 == 1
        )


def following_cells(cells: Sequence[ProfileCell]) -> list[ProfileCell]:
    """Of a grid, what is measured of steps that follow each other: half of the sizes, and what is held out. Each step
    draws a token, since later stages of one that draws none are still at work when it is collected."""
    return [
        cell
        for cell in cells
        if all(sequence.is_sampled for sequence in cell.sequences)
        and not (cell.prompts and cell.decodes)
        and (cell.held_out or cell.load.tokens.bit_count() == 1)
    ]


@contextmanager
def open_profiler(
    model: Path, section: EngineSection, hosts: RanksSection | None = None, token: str = ""
) -> Iterator["EngineProfiler"]:
    """Loads an instance's engine, with all its ranks, as a worker does. Ranks of other hosts, which know `token`, come
    by themselves. Raises CheckpointError, ConfigError or RankLostError."""
    ranks = None
    with ExitStack() as resources:
        if section.shape.num_ranks > 1:
            # When a rank is lost, a step of the engine raises.
            ranks = RankGroup(model, section, lambda error: None, hosts, token)
            resources.callback(ranks.close)
            ranks.start()
        engine, pools = load_worker_engine(model, section, ranks)
        for pool in pools:
            resources.callback(pool.close)
        resources.callback(engine.close)
        # Values as after real prompts; this also touches every page.
        for rank, pool in enumerate(pools):
            if isinstance(pool, SharedPool) and len(pool.tensor):
                for layer in pool.tensor.view(engine.pool.dtype).view(engine.layout.pool_of(rank).shape):
                    layer.copy_(torch.randn(layer.shape[1:]).expand(layer.shape))
        yield EngineProfiler(engine)


class EngineProfiler:
    """Times steps of a loaded engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._random = Random(0)

    @property
    def engine(self) -> Engine:
        return self._engine

    def measure(
        self, cells: Sequence[ProfileCell], budget_s: float, progress: Callable[[float], None] = lambda share: None
    ) -> list[Measurement]:
        """Times of steps that are computed one at a time.

        Each cell at least once, then in turns, so that a disturbance of the machine is in some rounds of each. Large
        cells get three rounds; otherwise every cell gets the same share of `budget_s`. Others on the machine only slow
        steps down, for seconds at a time, so the result is the lower quartile of a cell's times: with three to nine
        rounds it varies half as much as their median.

        `cells` ascend in size. Cells that the pool cannot hold, or that would take too long, are left out. `progress`
        gets the share of the budget that is used.
        """
        return self._measure(cells, budget_s, progress, self._times, 1)

    def measure_following(
        self, cells: Sequence[ProfileCell], budget_s: float, progress: Callable[[float], None] = lambda share: None
    ) -> list[Measurement]:
        """As `measure`, with a step in each pipeline stage: the times from the end of a step to the end of the next
        one, of other sequences. Every cell draws a token."""
        return self._measure(cells, budget_s, progress, self._following_times, self._engine.num_stages)

    def _measure(
        self,
        cells: Sequence[ProfileCell],
        budget_s: float,
        progress: Callable[[float], None],
        times_of: Callable[[ProfileCell], list[float]],
        copies: int,
    ) -> list[Measurement]:
        """`copies` of a cell are in the pool at once."""
        layout = self._engine.layout
        cells = [cell for cell in cells if copies * cell.blocks(layout.block_size) <= layout.num_blocks]
        began_s = time.perf_counter()
        seconds: dict[int, list[float]] = {}
        for index, cell in enumerate(cells):
            if index and seconds[index - 1][0] * cell.load.tokens / cells[index - 1].load.tokens > _MAX_CELL_S:
                break  # all following cells are at least as large
            seconds[index] = times_of(cell)
            progress(min(1.0, (time.perf_counter() - began_s) / budget_s))
        while (used_s := time.perf_counter() - began_s) < budget_s:
            # The cell with the least time so far; cells with too few rounds first.
            index = min(seconds, key=lambda index: (len(seconds[index]) >= _MIN_ROUNDS, sum(seconds[index])))
            seconds[index] += times_of(cells[index])
            progress(min(1.0, used_s / budget_s))
        progress(1.0)
        return [
            Measurement(
                **asdict(cells[index].load),
                seconds=float(np.quantile(times, _QUANTILE)),
                rounds=len(times),
                held_out=cells[index].held_out,
            )
            for index, times in seconds.items()
        ]

    def _times(self, cell: ProfileCell) -> list[float]:
        """Times of consecutive steps, as a worker runs them: a short step finds the caches as the previous one left
        them. The first of several steps does not count."""
        times = [self._time(cell)]
        while sum(times) < _BURST_S:
            times.append(self._time(cell))
        return times[1:] or times

    def _time(self, cell: ProfileCell) -> float:
        slices = self._slices(cell)
        began_s = time.perf_counter()
        self._engine.step(slices)
        self._engine.settle()  # without a drawn token, later stages still compute
        return time.perf_counter() - began_s

    def _following_times(self, cell: ProfileCell) -> list[float]:
        """Of consecutive steps with another one in each of the other stages. The first one does not count."""
        engine, count = self._engine, cell.blocks(self._engine.layout.block_size)
        steps = cycle([self._slices(cell, index * count) for index in range(engine.num_stages)])
        under_way = deque(engine.launch(next(steps)) for _ in range(engine.num_stages))
        times: list[float] = []
        engine.collect(under_way.popleft())
        ended_s = time.perf_counter()
        while sum(times) < _BURST_S or len(times) < 2:
            under_way.append(engine.launch(next(steps)))
            engine.collect(under_way.popleft())
            before_s, ended_s = ended_s, time.perf_counter()
            times.append(ended_s - before_s)
        while under_way:
            engine.collect(under_way.popleft())
        return times[1:]

    def _slices(self, cell: ProfileCell, block: int = 0) -> list[SequenceSlice]:
        """A step of new random tokens; every sequence has blocks of its own, from `block` on."""
        slices = []
        for sequence in cell.sequences:
            end = sequence.start + sequence.num_tokens
            count = -(-end // self._engine.layout.block_size)
            tokens = [self._random.randrange(self._engine.spec.vocab_size) for _ in range(sequence.num_tokens)]
            sample = SampleRequest(_GREEDY, end, (), sequence.start) if sequence.is_sampled else None
            slices.append(SequenceSlice(tokens, sequence.start, range(block, block + count), sample))
            block += count
        return slices

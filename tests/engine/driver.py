"""A minimal scheduler for tests: runs sequences through an engine with scattered blocks, in chunks, all mixed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.core.request import SampledToken, SamplingParams
from tandem.engine.engine import Engine
from tandem.engine.step import SampleRequest, SequenceSlice, StepHandle

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class RunningSequence:
    """One sequence on its way through the engine."""

    prompt: list[int]
    params: SamplingParams
    num_tokens: int
    blocks: list[int]
    computed: int = 0
    drawn: list[SampledToken] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return self.prompt + [token.token_id for token in self.drawn]

    @property
    def finished(self) -> bool:
        return len(self.drawn) == self.num_tokens


@dataclass(frozen=True)
class LaunchedStep:
    sequences: list[RunningSequence]
    handle: StepHandle


class Driver:
    """Gives every sequence random blocks of the pool, never the same to two."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self._engine = engine
        self._free = list(range(engine.capacity().num_blocks))
        random.Random(seed).shuffle(self._free)

    def add(self, prompt: Sequence[int], num_tokens: int, params: SamplingParams = GREEDY) -> RunningSequence:
        needed = self._engine.layout.blocks_for(len(prompt) + num_tokens)
        blocks, self._free = self._free[:needed], self._free[needed:]
        assert len(blocks) == needed, "the test's pool is too small"
        return RunningSequence(list(prompt), params, num_tokens, blocks)

    def step(self, sequences: Sequence[RunningSequence], chunk_tokens: int = 1 << 30) -> None:
        """One step in which every unfinished sequence advances by a chunk of its prompt or by one token."""
        self.collect(self.launch(sequences, chunk_tokens))

    def launch(self, sequences: Sequence[RunningSequence], chunk_tokens: int = 1 << 30) -> LaunchedStep:
        running = [sequence for sequence in sequences if not sequence.finished]
        slices = []
        for sequence in running:
            token_ids = sequence.token_ids
            end = min(sequence.computed + chunk_tokens, len(token_ids))
            request = None
            if end == len(token_ids):
                request = SampleRequest(sequence.params, end, token_ids, len(sequence.prompt))
            slices.append(
                SequenceSlice(token_ids[sequence.computed : end], sequence.computed, sequence.blocks, request)
            )
        return LaunchedStep(running, self._engine.launch(slices))

    def collect(self, step: LaunchedStep) -> None:
        output = self._engine.collect(step.handle)
        assert output.errors == [None] * len(step.sequences)
        for sequence, part, token in zip(step.sequences, step.handle.slices, output.tokens, strict=True):
            sequence.computed += len(part.token_ids)
            assert (token is None) == (part.sample is None)
            if token is not None:
                sequence.drawn.append(token)

    def run(self, sequences: Sequence[RunningSequence], chunk_tokens: int = 1 << 30) -> list[list[int]]:
        """Until all are finished; returns the tokens drawn for each."""
        while not all(sequence.finished for sequence in sequences):
            self.step(sequences, chunk_tokens)
        return [[token.token_id for token in sequence.drawn] for sequence in sequences]

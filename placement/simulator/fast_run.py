"""What an instance computes as one event: a step, many decode steps of one batch, or many chunks of one prompt."""

import math
from bisect import bisect_left
from typing import NamedTuple

from tandem.core.cost_model import CostModel, StepCost, StepLoad, attention_pairs
from tandem.scheduling.chunk import Chunk
from tandem.scheduling.fast_forward import FastForward, FullChunks


class ChunkStep(NamedTuple):
    """A step of these chunks, and of a token of each sequence that decodes `beside` them, if those are not chunks."""

    chunks: list[Chunk]
    beside: FastForward | None = None


class FastRun:
    """`num_steps` steps from `began_s` on, of which step i (from 0) takes

        base_s + per_kv_token_s * (kv_tokens + i * num_sequences)

    since every sequence adds a token of KV per step; so the first n steps take n * first_step_s + n (n - 1) / 2 *
    growth_s. The last one takes `late_s` longer.
    """

    __slots__ = ("began_s", "end_s", "first_step_s", "growth_s", "late_s", "num_steps", "steps")

    def __init__(self, steps: FastForward, line: tuple[float, float], began_s: float) -> None:
        """`line`: see `CostModel.decode_coefficients`."""
        base_s, per_kv_token_s = line
        self.steps = steps
        self.began_s = began_s
        self.first_step_s = base_s + per_kv_token_s * steps.kv_tokens
        self.growth_s = per_kv_token_s * steps.num_sequences
        self.num_steps = steps.max_steps
        self.late_s = 0.0
        self.end_s = self.end_of(steps.max_steps)

    def end_of(self, num_steps: int) -> float:
        """When that number of its steps is done."""
        late_s = self.late_s if num_steps == self.num_steps else 0.0
        return self.began_s + late_s + num_steps * (self.first_step_s + (num_steps - 1) / 2 * self.growth_s)

    def cut(self, now_s: float, late_s: float = 0.0) -> bool:
        """End the run with the step under way at `now_s`, which takes `late_s` longer. True if that moves its end."""
        elapsed_s, growth_s = max(0.0, now_s - self.began_s), self.growth_s
        # growth/2 n^2 + (first - growth/2) n = elapsed, in the form that stays exact for growth near 0.
        linear_s = self.first_step_s - growth_s / 2
        root_s = linear_s + math.sqrt(linear_s * linear_s + 2 * growth_s * elapsed_s)
        num_steps = max(1, math.ceil(2 * elapsed_s / root_s))
        while num_steps > 1 and self.end_of(num_steps - 1) >= now_s:
            num_steps -= 1
        while self.end_of(num_steps) < now_s:
            num_steps += 1
        if num_steps >= self.num_steps and late_s == 0:
            return False
        self.num_steps = min(num_steps, self.num_steps)
        self.late_s += late_s
        self.end_s = self.end_of(self.num_steps)
        return True

    def cut_before(self, now_s: float) -> None:
        """End the run before the step under way at `now_s`, perhaps before its first step."""
        self.cut(now_s)
        self.num_steps -= 1
        self.end_s = self.end_of(self.num_steps)


class ChunkRun:
    """`num_steps` steps of `chunks` from `began_s` on. `costs` are those of all the steps that it may have. A pipeline
    that hands its prompts over (`is_piped`) begins a step when the one before has left its first stage; elsewhere a
    step begins when the one before has ended. The last one takes `late_s` longer."""

    __slots__ = ("_ends_s", "began_s", "chunks", "costs", "end_s", "is_piped", "late_s", "num_steps", "start")

    def __init__(self, chunks: FullChunks, cost: CostModel, began_s: float) -> None:
        self.chunks = chunks
        self.start = chunks.sequence.num_computed
        self.began_s = began_s
        self.num_steps = chunks.max_steps
        self.late_s = 0.0
        self.costs = [cost.step(_load_of(chunks, self.start, index)) for index in range(chunks.max_steps)]
        self.is_piped = chunks.beside is None and chunks.sequence.hand_over and _is_piped(self.costs[0])
        self._ends_s: list[float] = []
        for step in self.costs:
            began_s += step.interval_s if self.is_piped else step.total_s
            self._ends_s.append(began_s)
        self.end_s = began_s

    def end_of(self, num_steps: int) -> float:
        """When that number of its steps is done, at least one, and the next one may begin."""
        return self._ends_s[num_steps - 1] + (self.late_s if num_steps == self.num_steps else 0.0)

    @property
    def results_s(self) -> float:
        """When the last stage is through with the last step."""
        last = self.costs[self.num_steps - 1]
        return self.end_s + (last.total_s - last.interval_s if self.is_piped else 0.0)

    def cut(self, now_s: float, late_s: float = 0.0) -> bool:
        """As `FastRun.cut`."""
        num_steps = min(bisect_left(self._ends_s, now_s) + 1, self.num_steps)
        if num_steps == self.num_steps and late_s == 0:
            return False
        self.num_steps = num_steps
        self.late_s += late_s
        self.end_s = self.end_of(num_steps)
        return True

    def first(self, num_steps: int) -> Chunk:
        """What that number of its steps computes of the prompt."""
        num_tokens = num_steps * self.chunks.num_tokens
        return Chunk(self.chunks.sequence, self.start, num_tokens, samples=False, is_prompt=True)


def _load_of(chunks: FullChunks, start: int, index: int) -> StepLoad:
    """Of the step of that index, 0 for the first."""
    num_tokens, beside = chunks.num_tokens, chunks.beside
    start += index * num_tokens
    num_decoding = 0 if beside is None else beside.num_sequences
    return StepLoad(
        prefill_tokens=num_tokens,
        prefill_sequences=1,
        prefill_pairs=attention_pairs(start, num_tokens),
        prefill_kv_tokens=start + num_tokens,
        decode_sequences=num_decoding,
        decode_kv_tokens=0 if beside is None else beside.kv_tokens + index * num_decoding,
        sampled=num_decoding,
    )


def _is_piped(cost: StepCost) -> bool:
    return cost.interval_s < cost.total_s

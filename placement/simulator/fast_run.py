"""What an instance computes as one event: a step, or many decode steps of one batch."""

import math
from typing import NamedTuple

from tandem.scheduling.chunk import Chunk
from tandem.scheduling.fast_forward import FastForward


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

"""What an instance computes of one sequence in one step."""

from dataclasses import dataclass

from tandem.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, start + num_tokens)` of `sequence`, computed in one step.

    A chunk of a prompt (`is_prompt`) computes tokens before the first drawn one, or computes them anew after a
    preemption; any other chunk is one token of decoding. Only after a chunk that `samples` is a token drawn.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    is_prompt: bool


def prompt_chunk(sequence: Sequence, max_tokens: int) -> Chunk:
    num_uncomputed = sequence.num_uncomputed
    num_tokens = min(num_uncomputed, max_tokens)
    return Chunk(sequence, sequence.num_computed, num_tokens, samples=num_tokens == num_uncomputed, is_prompt=True)

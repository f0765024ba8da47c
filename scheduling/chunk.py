"""The part of one sequence that a step computes."""

from dataclasses import dataclass

from tandem.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, start + num_tokens)` of `sequence`, computed in one step.

    With `is_prompt` these are tokens before the attempt's first sampled token, or tokens that are recomputed after a
    preemption; otherwise it is the last token of a decoding sequence. After a chunk that `samples`, a token is sampled.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    is_prompt: bool

    @property
    def begins_prefill(self) -> bool:
        """Whether the attempt's prompt begins with this chunk. True again for a prompt that was preempted."""
        return self.is_prompt and self.start == self.sequence.num_cached and not self.sequence.has_first_token


def prompt_chunk(sequence: Sequence, max_tokens: int) -> Chunk:
    """The next uncomputed tokens of the sequence, at most `max_tokens`."""
    num_uncomputed = sequence.num_uncomputed
    num_tokens = min(num_uncomputed, max_tokens)
    return Chunk(sequence, sequence.num_computed, num_tokens, samples=num_tokens == num_uncomputed, is_prompt=True)

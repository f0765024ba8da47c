"""Sequences of an instance that take part in steps."""

from collections import OrderedDict
from collections.abc import Hashable
from itertools import chain

from tandem.scheduling.chunk import Chunk
from tandem.scheduling.sequence import Sequence, SequenceState


class RunningSequences:
    """Both by key. `prompts` compute all tokens before the next one to draw, as newcomers or again after a preemption;
    the one admitted first comes first. `decoding` compute one token a step; the next to take part comes first.

    `uncomputed_tokens` are those of `prompts`.
    """

    __slots__ = ("decoding", "prompts", "uncomputed_tokens")

    def __init__(self) -> None:
        self.prompts: dict[Hashable, Sequence] = {}
        self.decoding: OrderedDict[Hashable, Sequence] = OrderedDict()
        self.uncomputed_tokens = 0

    def __len__(self) -> int:
        return len(self.prompts) + len(self.decoding)

    def start(self, sequence: Sequence) -> None:
        """It was admitted, and computes its prompt."""
        self.prompts[sequence.key] = sequence
        self.uncomputed_tokens += sequence.num_uncomputed

    def advance(self, chunk: Chunk) -> None:
        """Its chunk is computed, or under way."""
        sequence = chunk.sequence
        assert chunk.start == sequence.num_computed, "a chunk computed twice, or out of order"
        sequence.num_computed += chunk.num_tokens
        if chunk.is_prompt:
            self.uncomputed_tokens -= chunk.num_tokens

    def decode(self, sequence: Sequence) -> None:
        """A token was drawn after its prompt, here or where its KV comes from."""
        self.prompts.pop(sequence.key, None)
        self.decoding[sequence.key] = sequence

    def youngest(self) -> Sequence:
        """There must be one."""
        return max(chain(self.prompts.values(), self.decoding.values()), key=lambda sequence: sequence.order)

    def discard(self, sequence: Sequence) -> None:
        """It takes part in no further step; one that does not run is ignored."""
        if self.decoding.pop(sequence.key, None) is None and self.prompts.pop(sequence.key, None) is not None:
            self.uncomputed_tokens -= sequence.num_uncomputed

    def check_integrity(self) -> None:
        """Assert that sums and states are right, O(sequences)."""
        running = (*self.prompts.values(), *self.decoding.values())
        assert all(sequence.state is SequenceState.RUNNING for sequence in running)
        for sequence in self.decoding.values():
            assert sequence.num_uncomputed + sequence.num_under_way == 1, "decoding with a gap"
        assert self.uncomputed_tokens == sum(sequence.num_uncomputed for sequence in self.prompts.values())

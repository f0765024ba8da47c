"""The sequences of an instance that take part in steps."""

from collections import OrderedDict
from collections.abc import Hashable
from itertools import chain

from tandem.scheduling.chunk import Chunk
from tandem.scheduling.sequence import Sequence, SequenceState


class RunningSequences:
    """Two dictionaries by key. `prompts` have more than one token to compute, as new sequences or after a preemption;
    they are in the order of admission. `decoding` compute one token in a step; the next one to take part comes first.

    `uncomputed_tokens` is the sum over `prompts`.
    """

    __slots__ = ("decoding", "prompts", "uncomputed_tokens")

    def __init__(self) -> None:
        self.prompts: dict[Hashable, Sequence] = {}
        self.decoding: OrderedDict[Hashable, Sequence] = OrderedDict()
        self.uncomputed_tokens = 0

    def __len__(self) -> int:
        return len(self.prompts) + len(self.decoding)

    def start(self, sequence: Sequence) -> None:
        """The sequence was admitted, and computes its prompt."""
        self.prompts[sequence.key] = sequence
        self.uncomputed_tokens += sequence.num_uncomputed

    def advance(self, chunk: Chunk) -> None:
        """The chunk is computed, or under way."""
        sequence = chunk.sequence
        assert chunk.start == sequence.num_computed, "a chunk computed twice, or out of order"
        sequence.num_computed += chunk.num_tokens
        if chunk.is_prompt:
            self.uncomputed_tokens -= chunk.num_tokens

    def decode(self, sequence: Sequence) -> None:
        """The token after the prompt was sampled, here or on the instance that computed the KV."""
        self.prompts.pop(sequence.key, None)
        self.decoding[sequence.key] = sequence

    def youngest(self) -> Sequence:
        """The sequence that was added last. At least one runs."""
        return max(chain(self.prompts.values(), self.decoding.values()), key=lambda sequence: sequence.order)

    def discard(self, sequence: Sequence) -> None:
        """Remove the sequence; no effect if it does not run."""
        if self.decoding.pop(sequence.key, None) is None and self.prompts.pop(sequence.key, None) is not None:
            self.uncomputed_tokens -= sequence.num_uncomputed

    def check_integrity(self) -> None:
        """Assert that sums and states are right, O(sequences)."""
        running = (*self.prompts.values(), *self.decoding.values())
        assert all(sequence.state is SequenceState.RUNNING for sequence in running)
        for sequence in self.decoding.values():
            assert sequence.num_uncomputed + sequence.num_under_way == 1, "a decoding sequence has one token to compute"
        assert self.uncomputed_tokens == sum(sequence.num_uncomputed for sequence in self.prompts.values())

"""The sequences of an instance that wait for blocks, and the order in which they get them."""

from collections import OrderedDict

from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.sequence import Sequence, SequenceState
from tandem.scheduling.sequence_blocks import SequenceBlocks


class WaitingSequences:
    """Two queues in the order of age. *Prompts* are computed here: new sequences, and preempted ones, which have lost
    their KV. The KV of *remote* sequences comes from another instance.

    Blocks go to the first sequence of a queue, and of the two first ones to the older. Preempted sequences are older
    than all new ones, so none of these is admitted while a preempted sequence waits.

    If the first prompt does not fit, it is tried again only after more blocks are available, or after `memory_changed`.

    `prompt_tokens` and `remote_tokens` are sums over the queues. `cached_tokens` and `preemptions` are totals since the
    start.
    """

    __slots__ = (
        "_blocked",
        "_blocked_at",
        "_blocks",
        "_memory_changed",
        "_prompts",
        "_remote",
        "cached_tokens",
        "num_preempted",
        "preemptions",
        "prompt_tokens",
        "remote_tokens",
    )

    def __init__(self, blocks: SequenceBlocks) -> None:
        self._blocks = blocks
        self._prompts: KeyedHeap[Sequence] = KeyedHeap()
        self._remote: OrderedDict[Sequence, None] = OrderedDict()
        self._blocked: Sequence | None = None  # the prompt that did not fit at the last try,
        self._blocked_at = 0  # the number of available blocks then,
        self._memory_changed = False  # and whether it may fit now, even without more available blocks
        self.num_preempted = 0
        self.prompt_tokens = 0
        self.remote_tokens = 0
        self.cached_tokens = 0
        self.preemptions = 0

    def __len__(self) -> int:
        return len(self._prompts) + len(self._remote)

    @property
    def num_prompts(self) -> int:
        """Preempted sequences included."""
        return len(self._prompts)

    @property
    def num_remote(self) -> int:
        return len(self._remote)

    @property
    def first_prompt(self) -> Sequence | None:
        first = self._prompts.peek()
        return None if first is None else first[1]

    @property
    def is_blocked(self) -> bool:
        """Whether the first prompt did not fit at the last try, and nothing has changed since."""
        return (
            self._blocked is not None
            and self.first_prompt is self._blocked
            and not self._memory_changed
            and self._blocks.num_available <= self._blocked_at
        )

    def memory_changed(self) -> None:
        """The first prompt may fit now: blocks or claims were released, or more of its tokens are cached."""
        self._memory_changed = True

    # --- coming in ---------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """A new sequence."""
        if sequence.is_remote:
            self._remote[sequence] = None
            self.remote_tokens += sequence.num_tokens
        else:
            self._prompts.push(sequence, sequence.order)
            self.prompt_tokens += sequence.num_tokens

    def add_preempted(self, sequence: Sequence) -> None:
        """The sequence has lost its blocks. It recomputes its KV once it is admitted again."""
        sequence.move_to(SequenceState.PREEMPTED)
        self._prompts.push(sequence, sequence.order)
        self.prompt_tokens += sequence.num_tokens
        self.num_preempted += 1
        self.preemptions += 1

    # --- going out ---------------------------------------------------------------------------------------------------

    def reserve(self) -> list[Sequence]:
        """Give remote sequences their blocks in order, while their claims fit. The returned ones are RECEIVING now."""
        reserved: list[Sequence] = []
        while self._remote and not self.num_preempted:
            sequence = next(iter(self._remote))
            first = self.first_prompt
            if first is not None and first is self._blocked and first.order < sequence.order:
                break
            if not self._blocks.give(sequence, []):
                break
            self.discard(sequence)
            sequence.move_to(SequenceState.RECEIVING)
            reserved.append(sequence)
        return reserved

    def admit_first(self, now_s: float, max_uncomputed: int | None) -> Sequence | None:
        """Give the first prompt its blocks. The returned sequence is RUNNING now. None: it does not fit, the first
        remote sequence is older, or more than `max_uncomputed` of its tokens are not cached."""
        sequence = self.first_prompt
        if sequence is None or self.is_blocked:
            return None
        if self._remote and next(iter(self._remote)).order < sequence.order:
            return None
        cached = self._blocks.find_cached(sequence)
        num_uncomputed = sequence.num_tokens - len(cached) * self._blocks.block_size
        is_too_long = max_uncomputed is not None and num_uncomputed > max_uncomputed
        if is_too_long or not self._blocks.give(sequence, cached):
            self._blocks.give_back(cached)
            if not is_too_long:
                self._blocked, self._blocked_at = sequence, self._blocks.num_available
                self._memory_changed = False
            return None
        self._leave_prompts(sequence)
        self.cached_tokens += sequence.num_cached
        if sequence.started_s is None:
            sequence.started_s = now_s
        sequence.move_to(SequenceState.RUNNING)
        return sequence

    def discard(self, sequence: Sequence) -> None:
        """Remove the sequence; no effect if it does not wait."""
        if sequence in self._remote:
            del self._remote[sequence]
            self.remote_tokens -= sequence.num_tokens
        elif sequence in self._prompts:
            self._leave_prompts(sequence)

    def _leave_prompts(self, sequence: Sequence) -> None:
        self._prompts.discard(sequence)
        if sequence is self._blocked:
            self._blocked = None
        self.prompt_tokens -= sequence.num_tokens
        self.num_preempted -= sequence.state is SequenceState.PREEMPTED

    # --- for tests ---------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that counts and states are consistent. O(sequences)."""
        states = [sequence.state for sequence in self._prompts]
        assert states.count(SequenceState.PREEMPTED) == self.num_preempted
        assert states.count(SequenceState.WAITING) == len(states) - self.num_preempted
        assert all(sequence.state is SequenceState.WAITING for sequence in self._remote)
        assert self.prompt_tokens == sum(sequence.num_uncomputed for sequence in self._prompts)
        assert self.remote_tokens == sum(sequence.num_tokens for sequence in self._remote)

"""Which sequences a decode worker admits, and which tokens it computes next. Pure bookkeeping: no clock, no tensors."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from tandem.core.errors import OverloadedError
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.integrity import BlockTable, check_blocks
from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.scheduler import Chunk, Scheduler
from tandem.scheduling.sequence import Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class DecodePolicy:
    """`max_batch` bounds the sequences of one step, `max_queue` those that wait for a reservation.

    A sequence is admitted when it fits beside all others after each has grown by `growth_horizon_tokens` (or up to its
    own max_tokens, if that is less): a long horizon preempts rarely, a short one packs more densely.
    `max_chunk_tokens` bounds the tokens that all sequences being recomputed may add to one step.
    """

    max_batch: int
    max_queue: int
    growth_horizon_tokens: int = 256
    max_chunk_tokens: int = 512


@dataclass(frozen=True, slots=True)
class DecodeChunk(Chunk):
    """Only after a chunk that `samples` is a token drawn."""

    samples: bool


@dataclass(frozen=True, slots=True)
class DecodeCounts:
    """`waiting_tokens` are those of the sequences waiting for a reservation. `held_blocks` are those of reserved and
    running sequences, `claimed_blocks` what they will hold at the horizon of their growth. The last two are totals
    since the start."""

    waiting: int
    reserved: int
    running: int
    preempted: int
    waiting_tokens: int
    held_blocks: int
    claimed_blocks: int
    computed_tokens: int
    preemptions: int


class DecodeScheduler(Scheduler[DecodeChunk]):
    """Sequences from `add` until `finish`, `cancel` or `detach`. One thread; between two steps.

        add(sequence)                    -> WAITING
        for each of reserve(now)         -> RESERVED: start the transfer into its block_table
        committed(key, first token, now) -> RUNNING:  the KV has arrived
        chunks = next_batch(now)         -> one step; the engine computes it
        computed(chunk) for each chunk, then generated(key, token) for each that samples, then finish(key) where it ends
        expired(now)                     -> end each with cancel, or with detach while its transfer may still write

    Memory. A sequence *claims* the blocks it will need at the end of its growth horizon. A newcomer is admitted, in
    order of arrival, when its claim fits beside all claims. When the horizon was too short and memory runs out, the
    youngest running sequence is preempted: its blocks are freed, and before any newcomer it is admitted again and
    recomputed in chunks beside the others' tokens. The oldest running sequence therefore always advances, and every
    sequence ends.
    """

    __slots__ = (
        "_claimed_blocks",
        "_claims",
        "_held_blocks",
        "_next_order",
        "_policy",
        "_preempted",
        "_preemptions",
        "_running",
        "_waiting",
        "_waiting_tokens",
    )

    def __init__(self, policy: DecodePolicy, pool: BlockPool, block_size: int, max_model_len: int) -> None:
        super().__init__(pool, block_size, max_model_len)
        assert policy.max_batch > 0
        assert policy.max_chunk_tokens > 0
        self._policy = policy
        self._waiting: OrderedDict[Hashable, Sequence] = OrderedDict()  # the next to be reserved first
        self._running: OrderedDict[Hashable, Sequence] = OrderedDict()  # the next to take part in a step first
        self._preempted: KeyedHeap[Hashable] = KeyedHeap()  # by age
        self._claims: dict[Hashable, int] = {}  # of reserved and running sequences
        self._claimed_blocks = 0
        self._held_blocks = 0
        self._waiting_tokens = 0
        self._next_order = 0
        self._preemptions = 0

    @property
    def has_waiting(self) -> bool:
        """Whether a sequence waits for a reservation."""
        return bool(self._waiting)

    # --- coming in ---------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue it for a reservation. Raises ContextLengthError if it can never fit, OverloadedError if full."""
        self._check_length(sequence)
        if len(self._waiting) >= self._policy.max_queue:
            raise OverloadedError("The decode queue is full; try again later.")
        self._enter(sequence)
        sequence.order = self._next_order
        self._next_order += 1
        self._waiting[sequence.key] = sequence
        self._waiting_tokens += sequence.num_tokens

    def reserve(self, now_s: float) -> list[Sequence]:
        """Give waiting sequences blocks for their KV to arrive in, first come first served, while claims fit.

        End what is `expired` first. No newcomer is admitted while a preempted sequence waits.
        """
        reserved: list[Sequence] = []
        while self._waiting and not self._preempted:
            sequence = next(iter(self._waiting.values()))
            if not self._admit(sequence):
                break
            self._leave_queue(sequence)
            sequence.reserved_s = now_s
            sequence.move_to(SequenceState.RESERVED)
            reserved.append(sequence)
        return reserved

    def committed(self, key: Hashable, first_token_id: int, now_s: float) -> Sequence:
        """The KV of all tokens of the request is in the blocks; `first_token_id` is what prefill drew from it."""
        sequence = self._sequences[key]
        assert sequence.state is SequenceState.RESERVED, "a transfer into blocks that were not reserved"
        sequence.num_computed = sequence.num_tokens
        sequence.committed_s = now_s
        sequence.append(first_token_id)
        sequence.move_to(SequenceState.RUNNING)
        self._running[key] = sequence
        self._claim(sequence)
        return sequence

    # --- stepping ----------------------------------------------------------------------------------------------------

    def next_batch(self, now_s: float) -> list[DecodeChunk]:
        """One token of each running sequence, and chunks of those being recomputed; at most `max_batch` sequences.

        Empty only when none is running. When more are ready they take turns. Each chunk's blocks are in its sequence's
        block table.
        """
        self._readmit()
        chunks = self._grow(self._pick())
        while not chunks and self._running:  # all whose turn it was lost their memory: it is the older ones' turn
            chunks = self._grow(self._pick())
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.started_s is None:
                sequence.started_s = now_s
            if len(chunks) < len(self._running):
                self._running.move_to_end(sequence.key)
        return chunks

    def generated(self, key: Hashable, token_id: int) -> Sequence:
        """Append the token drawn after a chunk that samples. Ask the sequence's `finish_reason_after` next."""
        sequence = self._sequences[key]
        assert sequence.num_uncomputed == 0, "a token drawn from a place that is not the end"
        sequence.append(token_id)
        self._claim(sequence)
        return sequence

    # --- going out ---------------------------------------------------------------------------------------------------

    def finish(self, key: Hashable) -> Sequence:
        """It has its last token: free its blocks."""
        sequence = self._sequences[key]
        self._pool.release(self._remove(sequence))
        return sequence

    def cancel(self, key: Hashable) -> Sequence | None:
        """Drop it in any state and free its blocks. None when it is not (or no longer) here.

        Not while a transfer may still write into its blocks: `detach` it then.
        """
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._pool.release(self._remove(sequence))
        return sequence

    def detach(self, key: Hashable) -> list[int]:
        """Drop it, but keep its blocks allocated: the caller releases them to the pool once nobody writes there."""
        return self._remove(self._sequences[key])

    def expired(self, now_s: float) -> list[Sequence]:
        """Sequences whose deadline has passed, each reported once, nothing freed: `cancel` or `detach` each now."""
        return [self._sequences[key] for key in self._deadlines.pop_until(now_s)]

    # --- for status and tests ----------------------------------------------------------------------------------------

    def counts(self) -> DecodeCounts:
        return DecodeCounts(
            waiting=len(self._waiting),
            reserved=len(self._claims) - len(self._running),
            running=len(self._running),
            preempted=len(self._preempted),
            waiting_tokens=self._waiting_tokens,
            held_blocks=self._held_blocks,
            claimed_blocks=self._claimed_blocks,
            computed_tokens=self._computed_tokens,
            preemptions=self._preemptions,
        )

    def block_tables(self) -> list[BlockTable]:
        return [self._sequences[key].block_table for key in self._claims]

    def check_integrity(self, other_owners: Iterable[BlockTable] = ()) -> None:
        """Every held block is a live sequence's or one of `other_owners` (quarantined); assert, O(num_blocks)."""
        assert len(self._sequences) == len(self._waiting) + len(self._claims) + len(self._preempted)
        assert self._claimed_blocks == sum(self._claims.values())
        assert self._held_blocks == sum(len(table) for table in self.block_tables())
        assert self._waiting_tokens == sum(sequence.num_tokens for sequence in self._waiting.values())
        for key, claim in self._claims.items():
            assert len(self._sequences[key].block_table) <= claim, "a sequence holds more than it claims"
        check_blocks(self._pool, [*self.block_tables(), *other_owners])

    # --- memory ------------------------------------------------------------------------------------------------------

    def _claim_of(self, sequence: Sequence) -> int:
        return self._grown_blocks(sequence, self._policy.growth_horizon_tokens)

    def _claim(self, sequence: Sequence) -> None:
        claim = self._claim_of(sequence)
        self._claimed_blocks += claim - self._claims.get(sequence.key, 0)
        self._claims[sequence.key] = claim

    def _admit(self, sequence: Sequence) -> bool:
        """Give it blocks for its present tokens if its claim fits. Blocks in quarantine are nobody's to claim."""
        quarantined = self._pool.num_held - self._held_blocks
        if self._claimed_blocks + self._claim_of(sequence) > self._pool.num_blocks - quarantined:
            return False
        count = self._blocks_for(sequence.num_tokens)
        if not self._pool.can_allocate(count):
            return False
        self._allocate(sequence, count)
        self._claim(sequence)
        return True

    def _allocate(self, sequence: Sequence, count: int) -> None:
        sequence.block_table.extend(self._pool.allocate(count))
        self._held_blocks += count

    def _readmit(self) -> None:
        """Admit preempted sequences again, oldest first; they compute their KV anew."""
        while (first := self._preempted.peek()) is not None:
            sequence = self._sequences[first[1]]
            if not self._admit(sequence):
                return
            self._preempted.discard(sequence.key)
            sequence.move_to(SequenceState.RUNNING)
            self._running[sequence.key] = sequence

    def _pick(self) -> list[DecodeChunk]:
        """Whose turn it is. Sequences being recomputed share a budget; one that gets none keeps its turn."""
        chunks: list[DecodeChunk] = []
        recompute_budget = self._policy.max_chunk_tokens
        for sequence in self._running.values():
            if len(chunks) == self._policy.max_batch:
                break
            missing = sequence.num_uncomputed
            num_tokens = missing
            if missing > 1:
                num_tokens = min(missing, recompute_budget)
                recompute_budget -= num_tokens
            if num_tokens > 0:
                chunks.append(DecodeChunk(sequence, sequence.num_computed, num_tokens, num_tokens == missing))
        return chunks

    def _grow(self, chunks: list[DecodeChunk]) -> list[DecodeChunk]:
        """Give each chunk its blocks; until there are enough, preempt the youngest. Returns the chunks left."""
        while True:
            growing = []
            for chunk in chunks:
                count = self._blocks_for(chunk.start + chunk.num_tokens) - len(chunk.sequence.block_table)
                if count > 0:
                    growing.append((chunk.sequence, count))
            if self._pool.can_allocate(sum(count for _, count in growing)):
                break
            youngest = max(self._running.values(), key=lambda sequence: sequence.order)
            self._preempt(youngest)
            chunks = [chunk for chunk in chunks if chunk.sequence is not youngest]
        for sequence, count in growing:
            self._allocate(sequence, count)
        return chunks

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.key]
        self._pool.release(self._take_blocks(sequence))
        sequence.move_to(SequenceState.PREEMPTED)
        self._preempted.push(sequence.key, sequence.order)
        self._preemptions += 1

    def _take_blocks(self, sequence: Sequence) -> list[int]:
        self._claimed_blocks -= self._claims.pop(sequence.key, 0)
        self._held_blocks -= len(sequence.block_table)
        return sequence.take_blocks()

    def _leave_queue(self, sequence: Sequence) -> None:
        if self._waiting.pop(sequence.key, None) is not None:
            self._waiting_tokens -= sequence.num_tokens

    def _remove(self, sequence: Sequence) -> list[int]:
        """Forget it; its blocks are the caller's."""
        self._forget(sequence)
        self._leave_queue(sequence)
        self._running.pop(sequence.key, None)
        self._preempted.discard(sequence.key)
        sequence.move_to(SequenceState.FINISHED)
        return self._take_blocks(sequence)

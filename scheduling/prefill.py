"""Which prompt tokens a prefill worker computes next. Pure bookkeeping: no clock, no tensors."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from tandem.core.errors import OverloadedError
from tandem.scheduling.admission import take_prompt_blocks
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.integrity import BlockTable, check_blocks
from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.scheduler import Chunk, Scheduler
from tandem.scheduling.sequence import Sequence, SequenceState


def fcfs(sequence: Sequence) -> float:
    """First come, first served."""
    return sequence.arrival_s


# An order policy gives each sequence a number when it is added; the lowest waiting one is started first.
OrderPolicy = Callable[[Sequence], float]
ORDERS: dict[str, OrderPolicy] = {"fcfs": fcfs}


@dataclass(frozen=True, slots=True)
class PrefillPolicy:
    """`max_batch_tokens` bounds one step, `max_queue` the sequences not yet started."""

    max_batch_tokens: int
    max_queue: int
    order: str = "fcfs"


@dataclass(frozen=True, slots=True)
class PrefillChunk(Chunk):
    """The token drawn after the last chunk is the first output."""

    is_last: bool


@dataclass(frozen=True, slots=True)
class PrefillCounts:
    """`waiting_tokens` are the tokens yet to compute, of waiting and running sequences; a cached prefix is known, and
    left out, from the first chunk on. The last three are totals since the start."""

    waiting: int
    running: int
    waiting_tokens: int
    running_blocks: int
    computed_tokens: int
    cached_tokens: int
    expired: int


class PrefillScheduler(Scheduler[PrefillChunk]):
    """Sequences from `add` until their last chunk is computed.

    The worker's loop, all of it between two steps and on one thread:

        take_expired(now)                -> answer those with DeadlineError
        chunks = next_batch(now)         -> one packed step; empty: nothing to do, or memory is under lease
        ... the engine computes ...
        computed(chunk) for each chunk   -> after a last chunk the sequence is HELD and the worker's, who puts its
                                            blocks under a lease and calls `release` when that has ended

    Blocks for the whole prompt are taken with the first chunk, so a started sequence never waits for memory, and
    sequences start strictly in order: the first in line gets the next memory that comes free, and memory does come
    free, since started sequences end and leases expire.
    """

    __slots__ = (
        "_cached_tokens",
        "_expired",
        "_index",
        "_num_expired",
        "_order",
        "_policy",
        "_running",
        "_running_blocks",
        "_waiting",
        "_waiting_tokens",
    )

    def __init__(
        self,
        policy: PrefillPolicy,
        pool: BlockPool,
        prefix_index: PrefixIndex,
        block_size: int,
        max_model_len: int,
    ) -> None:
        super().__init__(pool, block_size, max_model_len)
        self._policy = policy
        self._order = ORDERS[policy.order]
        self._index = prefix_index
        self._waiting: KeyedHeap[Hashable] = KeyedHeap()
        self._running: OrderedDict[Hashable, Sequence] = OrderedDict()  # the oldest first
        self._expired: list[Sequence] = []
        self._waiting_tokens = 0
        self._running_blocks = 0
        self._cached_tokens = 0
        self._num_expired = 0

    def add(self, sequence: Sequence) -> None:
        """Queue it. Raises ContextLengthError if it can never fit, OverloadedError if the queue is full."""
        self._check_length(sequence)
        if len(self._waiting) >= self._policy.max_queue:
            raise OverloadedError("The prefill queue is full; try again later.")
        self._enter(sequence)
        self._waiting.push(sequence.key, self._order(sequence))
        self._waiting_tokens += sequence.num_tokens

    def cancel(self, key: Hashable) -> Sequence | None:
        """Drop it in any state and free its blocks. None when it is not (or no longer) here."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._remove(sequence)
            self._pool.release(sequence.take_blocks())
            sequence.move_to(SequenceState.FINISHED)
        return sequence

    def take_expired(self, now_s: float) -> list[Sequence]:
        """Sequences whose deadline has passed: FINISHED, their blocks free. Each is returned once."""
        self._expire(now_s)
        expired, self._expired = self._expired, []
        return expired

    def next_batch(self, now_s: float) -> list[PrefillChunk]:
        """At most `max_batch_tokens` tokens, oldest sequences first; call `computed` for each before asking again."""
        self._expire(now_s)
        budget = self._policy.max_batch_tokens
        chunks: list[PrefillChunk] = []
        for sequence in self._running.values():
            if budget == 0:
                return chunks
            chunks.append(_next_chunk(sequence, budget))
            budget -= chunks[-1].num_tokens
        while budget > 0 and (first := self._waiting.peek()) is not None:
            sequence = self._sequences[first[1]]
            if not self._start(sequence, now_s):
                break
            chunks.append(_next_chunk(sequence, budget))
            budget -= chunks[-1].num_tokens
        return chunks

    def computed(self, chunk: PrefillChunk) -> bool:
        if not super().computed(chunk):
            return False
        sequence = chunk.sequence
        self._waiting_tokens -= chunk.num_tokens
        self._index.insert(
            sequence.token_ids,
            sequence.block_table,
            sequence.num_computed,
            sequence.request.cache_salt,
            sequence.block_hashes,
            start=chunk.start,
        )
        if chunk.is_last:
            self._remove(sequence)
            sequence.move_to(SequenceState.HELD)
        return True

    def release(self, sequence: Sequence) -> None:
        """Free a HELD sequence that goes nowhere: its first token was also its last, or its request was cancelled."""
        self._pool.release(sequence.take_blocks())
        sequence.move_to(SequenceState.FINISHED)

    def counts(self) -> PrefillCounts:
        return PrefillCounts(
            waiting=len(self._waiting),
            running=len(self._running),
            waiting_tokens=self._waiting_tokens,
            running_blocks=self._running_blocks,
            computed_tokens=self._computed_tokens,
            cached_tokens=self._cached_tokens,
            expired=self._num_expired,
        )

    def block_tables(self) -> list[BlockTable]:
        return [sequence.block_table for sequence in self._running.values()]

    def check_integrity(self, other_owners: Iterable[BlockTable] = ()) -> None:
        """Every held block is a running sequence's or one of `other_owners` (leases); assert, O(num_blocks)."""
        assert self._sequences.keys() == self._running.keys() | {k for k in self._sequences if k in self._waiting}
        assert len(self._sequences) == len(self._running) + len(self._waiting)
        assert self._waiting_tokens == sum(sequence.num_uncomputed for sequence in self._sequences.values())
        assert self._running_blocks == sum(len(table) for table in self.block_tables())
        self._index.check_integrity()
        check_blocks(self._pool, [*self.block_tables(), *other_owners])

    def _start(self, sequence: Sequence, now_s: float) -> bool:
        """Give the first in line its blocks. False, and nothing changed, when memory is short."""
        if not take_prompt_blocks(sequence, self._pool, self._index):
            return False
        sequence.started_s = now_s
        sequence.move_to(SequenceState.RUNNING)
        self._waiting.discard(sequence.key)
        self._running[sequence.key] = sequence
        self._running_blocks += len(sequence.block_table)
        self._waiting_tokens -= sequence.num_cached
        self._cached_tokens += sequence.num_cached
        return True

    def _remove(self, sequence: Sequence) -> None:
        self._forget(sequence)
        self._waiting.discard(sequence.key)
        if self._running.pop(sequence.key, None) is not None:
            self._running_blocks -= len(sequence.block_table)
        self._waiting_tokens -= sequence.num_uncomputed

    def _expire(self, now_s: float) -> None:
        for key in self._deadlines.pop_until(now_s):
            sequence = self.cancel(key)
            assert sequence is not None, "a deadline outlived its sequence"
            self._num_expired += 1
            self._expired.append(sequence)


def _next_chunk(sequence: Sequence, budget: int) -> PrefillChunk:
    num_tokens = min(budget, sequence.num_uncomputed)
    return PrefillChunk(sequence, sequence.num_computed, num_tokens, num_tokens == sequence.num_uncomputed)

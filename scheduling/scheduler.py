"""The sequences of an instance, and the tokens that it computes next. Pure bookkeeping: no clock, no tensors."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from tandem.core.errors import ContextLengthError, OverloadedError
from tandem.scheduling.batch_composer import MIN_GROUP, BatchComposer
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import StepBudget
from tandem.scheduling.chunk import Chunk
from tandem.scheduling.integrity import BlockTable, check_blocks
from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.predictor import StepPredictor
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.running_sequences import RunningSequences
from tandem.scheduling.sequence import Sequence, SequenceState
from tandem.scheduling.sequence_blocks import SequenceBlocks
from tandem.scheduling.waiting_sequences import WaitingSequences


@dataclass(frozen=True, slots=True)
class SchedulerCounts:
    """Sequences by state, then tokens, then totals since the start.

    `waiting` sequences have a prompt to compute here, `unreserved` ones wait for blocks for KV from another instance;
    `prompts` and `decoding` run. `uncomputed_tokens` are those of waiting, preempted and running prompts,
    `unreserved_tokens` those of unreserved sequences.
    """

    waiting: int
    unreserved: int
    receiving: int
    prompts: int
    decoding: int
    preempted: int
    uncomputed_tokens: int
    unreserved_tokens: int
    computed_tokens: int
    cached_tokens: int
    preemptions: int


class Scheduler:
    """Owns sequences from `add` until `finish`, `cancel` or `detach`, or until they are held for another instance.

    The calls of the worker's loop, all between two steps and on one thread:

        add(sequence)                    -> WAITING
        for each of expired(now)         -> end it with cancel, or with detach while its transfer may still write
        for each of reserve()            -> RECEIVING: start the transfer into its block_table
        committed(key, first token, now) -> RUNNING:   the KV has arrived
        chunks = next_batch(now)         -> one step, for the engine
        launched(chunks)                 -> only if more steps are scheduled before the results of this one are there
        computed(chunk) for each chunk   -> after its last chunk, a prompt to be handed over is HELD: the worker owns it
                                            and calls `release` when its KV was fetched or is no longer needed
        generated(key, token) for each other chunk that samples, then finish(key) if the sequence ends

    The parts: `WaitingSequences` (which sequence gets blocks next), `SequenceBlocks` (whether it fits),
    `RunningSequences` and `BatchComposer` (what a step computes, and which sequence is preempted). The prefix cache
    gets the blocks of prompts, not those of answers.
    """

    composer_type: ClassVar[type[BatchComposer]] = BatchComposer

    __slots__ = (
        "_blocks",
        "_composer",
        "_computed_tokens",
        "_deadlines",
        "_index",
        "_next_order",
        "_pool",
        "_running",
        "_sequences",
        "_waiting",
        "budget",
        "max_model_len",
    )

    def __init__(
        self,
        budget: StepBudget,
        pool: BlockPool,
        prefix_index: PrefixIndex,
        max_model_len: int,
        predictor: StepPredictor | None = None,
        num_stages: int = 1,
        min_group: int = MIN_GROUP,
    ) -> None:
        """`max_model_len` is the longest prompt plus answer; the attribute is lower if the pool is smaller. `predictor`
        predicts step times for budgets that mix by slack; the caller corrects it. For `num_stages` and `min_group`
        see `BatchComposer`."""
        self.budget = budget  # read only; `set_budget` changes it
        self.max_model_len = min(max_model_len, pool.num_blocks * prefix_index.block_size)
        self._pool = pool
        self._index = prefix_index
        self._sequences: dict[Hashable, Sequence] = {}
        self._deadlines: KeyedHeap[Hashable] = KeyedHeap()
        self._blocks = SequenceBlocks(budget, pool, prefix_index, self.max_model_len)
        self._waiting = WaitingSequences(self._blocks)
        self._running = RunningSequences()
        self._composer = self.composer_type(
            budget, self._waiting, self._running, self._blocks, predictor, num_stages, min_group
        )
        self._next_order = 0
        self._computed_tokens = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def get(self, key: Hashable) -> Sequence | None:
        return self._sequences.get(key)

    def has_waiting_before(self, *, is_remote: bool) -> bool:
        """Whether a new sequence would wait behind others, so that it changes nothing before these leave. Waiting
        prompts do not hold back remote sequences while there is memory."""
        return self.has_unreserved or (not is_remote and self._waiting.num_prompts > 0)

    @property
    def has_unreserved(self) -> bool:
        """Whether a sequence waits for blocks for KV from another instance."""
        return self._waiting.num_remote > 0

    def length_limit(self, sequence: Sequence) -> int:
        """The most tokens, prompt and answer together, that the sequence may have."""
        return min(sequence.request.max_total_tokens, self.max_model_len)

    def set_budget(self, budget: StepBudget) -> None:
        """Applies from the next step on. Running sequences go on, even if the new budget would not admit them."""
        self.budget = self._composer.budget = budget
        self._blocks.set_budget(budget)
        self._waiting.memory_changed()

    # --- new sequences -----------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue the sequence. Raises ContextLengthError if it can never fit, OverloadedError if the queue is full."""
        assert sequence.key not in self._sequences, f"{sequence.key!r} is scheduled already"
        if sequence.num_tokens >= self.max_model_len:
            raise ContextLengthError(
                f"The prompt has {sequence.num_tokens} tokens; this model takes at most {self.max_model_len} tokens,"
                " prompt and answer together."
            )
        if len(self._waiting) - self._waiting.num_preempted >= self.budget.max_queue:
            raise OverloadedError("The queue of this instance is full; try again later.")
        self._sequences[sequence.key] = sequence
        if sequence.request.deadline_s != float("inf"):
            self._deadlines.push(sequence.key, sequence.request.deadline_s)
        sequence.order = self._next_order
        self._next_order += 1
        self._waiting.add(sequence)

    def reserve(self) -> list[Sequence]:
        """Give remote sequences their blocks, in order of arrival, while they fit. No new sequence gets blocks while a
        preempted one waits. End the `expired` sequences first."""
        return self._waiting.reserve()

    def committed(self, key: Hashable, first_token_id: int, now_s: float) -> Sequence:
        """The KV of all tokens of the request is in the sequence's blocks. The prefill instance sampled
        `first_token_id` from it."""
        sequence = self._sequences[key]
        assert sequence.state is SequenceState.RECEIVING, "a transfer into blocks that were not reserved"
        sequence.num_computed = sequence.num_tokens
        sequence.committed_s = sequence.first_token_s = now_s
        sequence.append(first_token_id)
        sequence.move_to(SequenceState.RUNNING)
        self._running.decode(sequence)
        self._blocks.update_claim(sequence)
        return sequence

    # --- stepping ----------------------------------------------------------------------------------------------------

    def next_batch(self, now_s: float) -> list[Chunk]:
        """The chunks of the next step, decoding sequences first. `computed` or `launched` has to follow before the next
        call.

        If more sequences decode than `max_batch`, they take turns. Each chunk's blocks are in its sequence's block
        table. Empty if no sequence runs and none can be admitted, or if all wait for steps under way.
        """
        return self._composer.next_batch(now_s)

    def launched(self, chunks: Iterable[Chunk]) -> None:
        """The step of these chunks is under way, and the next step may have the chunks that follow them. `computed` is
        called later for each."""
        for chunk in chunks:
            self._running.advance(chunk)
            chunk.sequence.num_under_way += 1

    def computed(self, chunk: Chunk) -> bool:
        """The KV of `chunk` is in its blocks. False if the sequence has ended meanwhile: drop the chunk's result. Steps
        are computed in the order of their launch."""
        sequence = chunk.sequence
        if self._sequences.get(sequence.key) is not sequence:
            if self._blocks.end_step(sequence):
                self._waiting.memory_changed()
            return False
        if sequence.num_under_way:
            sequence.num_under_way -= 1
        else:
            self._running.advance(chunk)
        self._computed_tokens += chunk.num_tokens
        if chunk.is_prompt:
            self._index.insert(
                sequence.token_ids,
                sequence.block_table,
                chunk.start + chunk.num_tokens,
                sequence.request.cache_salt,
                sequence.block_hashes,
                start=chunk.start,
            )
            self._waiting.memory_changed()  # more tokens of the first prompt may be cached now
            if chunk.samples and sequence.hand_over:
                self._forget(sequence)
                self._blocks.drop(sequence)
                sequence.move_to(SequenceState.HELD)
        return True

    def generated(self, key: Hashable, token_id: int) -> Sequence:
        """Append the token that was sampled after a chunk. The caller then asks `Sequence.finish_reason_after`, and
        sets `first_token_s` with the first token."""
        sequence = self._sequences[key]
        assert sequence.num_uncomputed == 0, "a token is sampled after all tokens of its sequence"
        sequence.append(token_id)
        if key in self._running.prompts:
            self._running.decode(sequence)
        self._blocks.update_claim(sequence)
        return sequence

    # --- the end of sequences ----------------------------------------------------------------------------------------

    def finish(self, key: Hashable) -> Sequence:
        """The sequence has its last token: free its blocks."""
        sequence = self._sequences[key]
        self._end(sequence)
        return sequence

    def cancel(self, key: Hashable) -> Sequence | None:
        """Drop the sequence in any state, and free its blocks once no step with it is under way. None if there is no
        such sequence. While a transfer may still write into its blocks, call `detach` instead."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._end(sequence)
        return sequence

    def detach(self, key: Hashable) -> list[int]:
        """Drop the sequence, but keep its blocks allocated: the caller releases them when no transfer writes there."""
        sequence = self._sequences[key]
        self._forget(sequence)
        self._blocks.drop(sequence)
        sequence.move_to(SequenceState.FINISHED)
        return sequence.take_blocks()

    def release(self, sequence: Sequence) -> None:
        """Free the blocks of a HELD sequence: its KV was fetched, or is no longer needed."""
        self._blocks.free(sequence)
        sequence.move_to(SequenceState.FINISHED)

    def expired(self, now_s: float) -> list[Sequence]:
        """Sequences whose deadline has passed, each reported once. The caller ends them by `cancel` or `detach`."""
        return [self._sequences[key] for key in self._deadlines.pop_until(now_s)]

    def _end(self, sequence: Sequence) -> None:
        self._forget(sequence)
        self._blocks.free(sequence)
        sequence.move_to(SequenceState.FINISHED)

    def _forget(self, sequence: Sequence) -> None:
        """Remove the sequence from all queues; its blocks stay as they are."""
        del self._sequences[sequence.key]
        self._deadlines.discard(sequence.key)
        self._waiting.discard(sequence)
        self._running.discard(sequence)
        self._waiting.memory_changed()

    # --- for status and tests ----------------------------------------------------------------------------------------

    def counts(self) -> SchedulerCounts:
        """O(1)."""
        waiting, running = self._waiting, self._running
        return SchedulerCounts(
            waiting=waiting.num_prompts - waiting.num_preempted,
            unreserved=waiting.num_remote,
            receiving=len(self._blocks.claims) - len(running),
            prompts=len(running.prompts),
            decoding=len(running.decoding),
            preempted=waiting.num_preempted,
            uncomputed_tokens=waiting.prompt_tokens + running.uncomputed_tokens,
            unreserved_tokens=waiting.remote_tokens,
            computed_tokens=self._computed_tokens,
            cached_tokens=waiting.cached_tokens,
            preemptions=waiting.preemptions,
        )

    @property
    def num_held_blocks(self) -> int:
        """Sum of the lengths of `block_tables`. O(leaving sequences)."""
        return self._blocks.num_allocated

    def block_tables(self) -> list[BlockTable]:
        return self._blocks.tables()

    def check_integrity(self, other_owners: Iterable[BlockTable] = ()) -> None:
        """Assert that every held block belongs to a live sequence or to `other_owners` (blocks that are held for a
        reader, or that a cancelled transfer may still write). O(num_blocks)."""
        self._waiting.check_integrity()
        self._running.check_integrity()
        self._blocks.check_integrity()
        self._index.check_integrity()
        assert len(self._sequences) == len(self._waiting) + len(self._blocks.claims)
        check_blocks(self._pool, [*self.block_tables(), *other_owners])

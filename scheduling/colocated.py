"""What a worker that serves both phases on one device computes next. Pure bookkeeping: no clock, no tensors."""

from bisect import bisect_right
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Literal

from tandem.core.errors import OverloadedError
from tandem.scheduling.admission import take_prompt_blocks
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.integrity import BlockTable, check_blocks
from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.scheduler import Chunk, Scheduler
from tandem.scheduling.sequence import Sequence, SequenceState
from tandem.scheduling.steady import SteadySteps

Mixing = Literal["chunked", "prompt_first", "padded"]


@dataclass(frozen=True, slots=True)
class ColocatedPolicy:
    """How prompts and decoding share the steps.

    chunked       Sarathi-Serve (OSDI'24), vLLM v1: every step takes a token of each decoding sequence first, then
                  chunks of prompts into what is left of `max_batch_tokens`. Decoding never stalls.
    prompt_first  vLLM 0.2: while prompts wait and fit, steps of whole prompts only, `max_batch_tokens` together (a
                  longer one goes alone); otherwise steps of all that decode. Every prompt stalls decoding.
    padded        vLLM 0.2.3: as prompt_first, but a step computes each prompt at the length of its longest.
                  The padding counts in `max_batch_tokens` and is at most `max_padding_tokens`.

    `max_batch` bounds the sequences that run, `max_queue` those that wait. A prompt is admitted when its blocks are
    there, a share `watermark` of the pool stays available beside them, and every sequence could still grow by
    `growth_horizon_tokens` (or up to its own max_tokens, if that is less). 0 as in vLLM: no growth is provided for, and
    what runs out of memory is preempted. Neither holds back a prompt that would run alone.
    """

    max_batch: int
    max_queue: int
    max_batch_tokens: int
    mixing: Mixing = "chunked"
    growth_horizon_tokens: int = 0
    watermark: float = 0.01
    max_padding_tokens: int = 256


@dataclass(frozen=True, slots=True)
class ColocatedChunk(Chunk):
    """Only after a chunk that `samples` is a token drawn.

    A prompt's chunk computes tokens before the first drawn one, or anew after a preemption; a chunk that is not a
    prompt's is one token of decoding.
    """

    samples: bool
    is_prompt: bool


@dataclass(frozen=True, slots=True)
class ColocatedCounts:
    """`prompts` and `decoding` are running, `preempted` wait to run again. `waiting_tokens` are yet to compute, of all
    that do not decode. The last three are totals since the start."""

    waiting: int
    preempted: int
    prompts: int
    decoding: int
    waiting_tokens: int
    computed_tokens: int
    cached_tokens: int
    preemptions: int


class ColocatedScheduler(Scheduler[ColocatedChunk]):
    """Sequences from `add` until `finish` or `cancel`. One thread; between two steps.

        add(sequence)             -> WAITING
        chunks = next_batch(now)  -> one step; the engine computes it
        computed(chunk) for each chunk, then generated(key, token) for each that samples, then finish(key) where it ends
        expired(now)              -> cancel each

    Blocks for all tokens known so far are taken with the first chunk, so a started prompt never waits for memory.
    Decoding takes more blocks as it goes; when none is left the youngest running sequence is preempted, and computes
    its KV anew once it is admitted again, before any newcomer. All waits in one line by age and nobody overtakes, so
    the oldest running sequence always advances and every sequence ends.

    The prefix cache is offered what prompts compute. Answers are not cached.

    Where tokens have no content (a simulator), `steady` and `advance` take many steps at once.
    """

    __slots__ = (
        "_cached_tokens",
        "_decoding",
        "_first_is_blocked",
        "_index",
        "_line",
        "_max_running",
        "_next_order",
        "_policy",
        "_preemptions",
        "_prompts",
        "_spare_blocks",
        "_waiting",
        "_waiting_tokens",
    )

    def __init__(self, policy: ColocatedPolicy, pool: BlockPool, prefix_index: PrefixIndex, max_model_len: int) -> None:
        super().__init__(pool, prefix_index.block_size, max_model_len)
        assert policy.max_batch > 0
        assert policy.max_batch_tokens > 0
        self._policy = policy
        self._index = prefix_index
        # In a chunked step every running sequence takes at least one token.
        self._max_running = policy.max_batch
        if policy.mixing == "chunked":
            self._max_running = min(policy.max_batch, policy.max_batch_tokens)
        self._spare_blocks = int(policy.watermark * pool.num_blocks)
        self._line: KeyedHeap[Hashable] = KeyedHeap()  # waiting and preempted, by age
        self._prompts: dict[Hashable, Sequence] = {}  # running, not decoding yet; oldest first
        self._decoding: dict[Hashable, Sequence] = {}  # running, all but their last token computed
        self._first_is_blocked = False  # memory was too short for the first in line, and none was given back since
        self._waiting = 0
        self._waiting_tokens = 0
        self._next_order = 0
        self._cached_tokens = 0
        self._preemptions = 0

    @property
    def has_waiting(self) -> bool:
        """Whether a sequence waits to be admitted, for the first time or again."""
        return len(self._line) > 0

    def add(self, sequence: Sequence) -> None:
        """Queue it. Raises ContextLengthError if it can never fit, OverloadedError if the queue is full."""
        self._check_length(sequence)
        if self._waiting >= self._policy.max_queue:
            raise OverloadedError("The queue is full; try again later.")
        self._enter(sequence)
        sequence.order = self._next_order
        self._next_order += 1
        self._line.push(sequence.key, sequence.order)
        self._waiting += 1
        self._waiting_tokens += sequence.num_tokens

    # --- stepping ----------------------------------------------------------------------------------------------------

    def next_batch(self, now_s: float) -> list[ColocatedChunk]:
        """Call `computed` for each before asking again. Empty only when nothing is here.

        Each chunk's blocks are in its sequence's block table. Decoding sequences come first, then prompts, oldest
        first.
        """
        if self._policy.mixing != "chunked":
            return self._prompt_chunks(self._policy.max_batch_tokens, now_s) or self._decode_chunks()
        chunks = self._decode_chunks()
        return chunks + self._prompt_chunks(self._policy.max_batch_tokens - len(chunks), now_s)

    def computed(self, chunk: ColocatedChunk) -> bool:
        if not super().computed(chunk):
            return False
        if chunk.is_prompt:
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
            self._first_is_blocked = False  # it may find more of its prompt cached now
        return True

    def generated(self, key: Hashable, token_id: int) -> Sequence:
        """Append the token drawn after a chunk that samples. Ask the sequence's `finish_reason_after` next."""
        sequence = self._sequences[key]
        assert sequence.num_uncomputed == 0, "a token drawn from a place that is not the end"
        sequence.append(token_id)
        if self._prompts.pop(key, None) is not None:
            self._decoding[key] = sequence
        return sequence

    # --- many steps at once ------------------------------------------------------------------------------------------

    def steady(self) -> SteadySteps | None:
        """How long every running sequence just decodes: none reaches its `length_limit` before the last of these steps,
        none is admitted or preempted. None: ask `next_batch`. `newcomers` have one token so far. O(sequences)."""
        decoding = self._decoding.values()
        if self._prompts or not decoding:
            return None
        if self._line and not self._first_is_blocked and len(decoding) < self._max_running:
            return None
        num_steps = min(self.length_limit(sequence) - sequence.num_tokens for sequence in decoding)
        available = self._index.num_available
        if self._blocks_to_grow(num_steps) > available:
            num_steps = bisect_right(range(1, num_steps), available, key=self._blocks_to_grow)
        if num_steps == 0:
            return None
        return SteadySteps(
            max_steps=num_steps,
            num_sequences=len(decoding),
            kv_tokens=sum(sequence.num_tokens for sequence in decoding),
            newcomers=[it for it in decoding if it.num_tokens == len(it.request.token_ids) + 1],
        )

    def advance(self, num_steps: int, now_s: float) -> list[Sequence]:
        """The same as `num_steps` steps, at most those of `steady`; but for which block is whose, and every token drawn
        is 0. Returns the sequences that have reached their limit, in the order of their chunks: `finish` each now.

        `now_s`, when the first began, is of no account here: whoever decodes was started before.
        """
        assert not self._prompts, "a prompt is being computed"
        has_room = self._index.make_room(self._blocks_to_grow(num_steps))
        assert has_room, "the batch does not stay the same for so long"
        drawn = [0] * num_steps
        for sequence in self._decoding.values():
            sequence.num_computed += num_steps
            sequence.extend(drawn)
            missing = self._blocks_for(sequence.num_computed) - len(sequence.block_table)
            if missing > 0:
                sequence.block_table.extend(self._pool.allocate(missing))
        self._computed_tokens += num_steps * len(self._decoding)
        return [it for it in self._decoding.values() if it.num_tokens >= self.length_limit(it)]

    # --- going out ---------------------------------------------------------------------------------------------------

    def finish(self, key: Hashable) -> Sequence:
        """It has its last token: free its blocks."""
        sequence = self._sequences[key]
        self._remove(sequence)
        return sequence

    def cancel(self, key: Hashable) -> Sequence | None:
        """Drop it in any state and free its blocks. None when it is not (or no longer) here."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._remove(sequence)
        return sequence

    def expired(self, now_s: float) -> list[Sequence]:
        """Sequences whose deadline has passed, each reported once, nothing freed: `cancel` each now."""
        return [self._sequences[key] for key in self._deadlines.pop_until(now_s)]

    # --- for status and tests ----------------------------------------------------------------------------------------

    def counts(self) -> ColocatedCounts:
        return ColocatedCounts(
            waiting=self._waiting,
            preempted=len(self._line) - self._waiting,
            prompts=len(self._prompts),
            decoding=len(self._decoding),
            waiting_tokens=self._waiting_tokens,
            computed_tokens=self._computed_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=self._preemptions,
        )

    def block_tables(self) -> list[BlockTable]:
        return [sequence.block_table for sequence in (*self._prompts.values(), *self._decoding.values())]

    def check_integrity(self, other_owners: Iterable[BlockTable] = ()) -> None:
        """Every held block is a running sequence's or one of `other_owners`; assert, O(num_blocks)."""
        in_line = [sequence for sequence in self._sequences.values() if sequence.key in self._line]
        assert len(in_line) == len(self._line)
        assert self._waiting == sum(sequence.state is SequenceState.WAITING for sequence in in_line)
        assert len(self._sequences) == len(in_line) + len(self._prompts) + len(self._decoding)
        assert all(sequence.num_uncomputed == 1 for sequence in self._decoding.values()), "decoding with a gap"
        not_decoding = (*in_line, *self._prompts.values())
        assert self._waiting_tokens == sum(sequence.num_uncomputed for sequence in not_decoding)
        self._index.check_integrity()
        check_blocks(self._pool, [*self.block_tables(), *other_owners])

    # --- batches -----------------------------------------------------------------------------------------------------

    def _prompt_chunks(self, budget: int, now_s: float) -> list[ColocatedChunk]:
        """Of prompts that run, then of the first in line; at most `budget` tokens, or one whole prompt."""
        whole, padded = self._policy.mixing != "chunked", self._policy.mixing == "padded"
        chunks: list[ColocatedChunk] = []
        for sequence in self._prompts.values():
            if budget > 0:
                chunks.append(_prompt_chunk(sequence, sequence.num_uncomputed if whole else budget))
                budget -= chunks[-1].num_tokens
        while budget > 0 and len(self._prompts) + len(self._decoding) < self._max_running:
            if padded and chunks and self._pads_too_much(chunks):
                break
            newcomer = self._admit_first(now_s, budget if whole and chunks else None)
            if newcomer is None:
                break
            chunks.append(_prompt_chunk(newcomer, newcomer.num_uncomputed if whole else budget))
            budget -= chunks[-1].num_tokens
        return chunks

    def _pads_too_much(self, chunks: list[ColocatedChunk]) -> bool:
        """Whether the first in line, as if nothing of it were cached, must not be padded together with `chunks`."""
        first = self._line.peek()
        if first is None:
            return False
        lengths = [*(chunk.num_tokens for chunk in chunks), self._sequences[first[1]].num_uncomputed]
        padded_tokens = len(lengths) * max(lengths)
        policy = self._policy
        return padded_tokens > policy.max_batch_tokens or padded_tokens - sum(lengths) > policy.max_padding_tokens

    def _decode_chunks(self) -> list[ColocatedChunk]:
        """A token of each that decodes and is not preempted to make room for the others."""
        while not self._index.make_room(self._blocks_to_grow(1)):
            running = (*self._prompts.values(), *self._decoding.values())
            self._preempt(max(running, key=lambda sequence: sequence.order))
        chunks = []
        for sequence in self._decoding.values():
            if self._blocks_for(sequence.num_tokens) > len(sequence.block_table):
                sequence.block_table.extend(self._pool.allocate(1))
            chunks.append(ColocatedChunk(sequence, sequence.num_computed, 1, samples=True, is_prompt=False))
        return chunks

    # --- memory ------------------------------------------------------------------------------------------------------

    def _blocks_to_grow(self, num_steps: int) -> int:
        """Blocks that `num_steps` steps add to those that decode."""
        size = self._block_size
        return sum(
            max(0, -(-(sequence.num_computed + num_steps) // size) - len(sequence.block_table))
            for sequence in self._decoding.values()
        )

    def _blocks_to_provide(self, newcomer: Sequence) -> int:
        """Blocks that must stay available beside those of the newcomer's prompt."""
        horizon = self._policy.growth_horizon_tokens
        if not self._prompts and not self._decoding:
            return 0
        blocks = self._spare_blocks
        if horizon > 0:
            blocks += self._claim_of(newcomer) - self._blocks_for(newcomer.num_tokens)
            for sequence in (*self._prompts.values(), *self._decoding.values()):
                blocks += self._claim_of(sequence) - len(sequence.block_table)
        return blocks

    def _claim_of(self, sequence: Sequence) -> int:
        return self._grown_blocks(sequence, self._policy.growth_horizon_tokens)

    def _admit_first(self, now_s: float, max_uncomputed: int | None) -> Sequence | None:
        """Let the first in line run, if it fits. Found too large for memory once, it is not looked at again before that
        can have changed."""
        first = self._line.peek()
        if first is None or self._first_is_blocked:
            return None
        sequence = self._sequences[first[1]]
        spare_blocks = self._blocks_to_provide(sequence)
        if not take_prompt_blocks(
            sequence, self._pool, self._index, spare_blocks=spare_blocks, max_uncomputed=max_uncomputed
        ):
            self._first_is_blocked = max_uncomputed is None
            return None
        self._line.discard(sequence.key)
        self._waiting -= sequence.state is SequenceState.WAITING
        self._waiting_tokens -= sequence.num_cached
        self._cached_tokens += sequence.num_cached
        if sequence.started_s is None:
            sequence.started_s = now_s
        sequence.move_to(SequenceState.RUNNING)
        self._prompts[sequence.key] = sequence
        return sequence

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._pool.release(sequence.take_blocks())
        sequence.move_to(SequenceState.PREEMPTED)
        self._line.push(sequence.key, sequence.order)
        self._waiting_tokens += sequence.num_tokens
        self._preemptions += 1
        self._first_is_blocked = False

    def _remove(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._forget(sequence)
        self._pool.release(sequence.take_blocks())
        sequence.move_to(SequenceState.FINISHED)
        self._first_is_blocked = False

    def _leave(self, sequence: Sequence) -> None:
        """Take it out of where it waits or runs."""
        if self._decoding.pop(sequence.key, None) is None:
            self._waiting_tokens -= sequence.num_uncomputed
            self._prompts.pop(sequence.key, None)
            self._line.discard(sequence.key)
            self._waiting -= sequence.state is SequenceState.WAITING


def _prompt_chunk(sequence: Sequence, budget: int) -> ColocatedChunk:
    missing = sequence.num_uncomputed
    num_tokens = min(missing, budget)
    return ColocatedChunk(sequence, sequence.num_computed, num_tokens, samples=num_tokens == missing, is_prompt=True)

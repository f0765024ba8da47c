"""Which tokens an instance computes next, of prompts and of answers. Pure bookkeeping: no clock, no tensors."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import chain, islice

from tandem.core.errors import ContextLengthError, OverloadedError
from tandem.scheduling.block_claims import BlockClaims
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import StepBudget
from tandem.scheduling.chunk import Chunk, prompt_chunk
from tandem.scheduling.integrity import BlockTable, check_blocks
from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.predictor import StepPredictor
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.sequence import Sequence, SequenceState
from tandem.scheduling.slack import max_prompt_tokens


@dataclass(frozen=True, slots=True)
class SchedulerCounts:
    """Sequences by state, then tokens, then totals since the start.

    `waiting` have a prompt to compute here, `unreserved` wait for blocks for KV that comes from elsewhere; `prompts`
    and `decoding` run. `uncomputed_tokens` are of waiting, preempted and running prompts, `unreserved_tokens` of the
    unreserved.
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


LEAST_GROUP = 16
"""Decoding sequences: with fewer, the time of a step is that of reading the weights, whatever their number."""


class Scheduler:
    """Sequences from `add` until `finish`, `cancel` or `detach`, or until their KV is held for another instance.

    The worker's loop, all of it between two steps and on one thread:

        add(sequence)                    -> WAITING
        for each of expired(now)         -> end it with cancel, or with detach while its transfer may still write
        for each of reserve(now)         -> RECEIVING: start the transfer into its block_table
        committed(key, first token, now) -> RUNNING:   the KV has arrived
        chunks = next_batch(now)         -> one step; the engine computes it
        launched(chunks)                 -> only if more steps are scheduled before the results of this one are there
        computed(chunk) for each chunk   -> a prompt to be handed over is HELD after its last chunk, and the worker's,
                                            who calls `release` once nobody reads its blocks
        generated(key, token) for each other chunk that samples, then finish(key) where it ends

    Memory. A running or receiving sequence *claims* the blocks that it needs at the end of its growth horizon. A
    newcomer is admitted when its claim fits beside all claims (`StepBudget`). Newcomers wait in two lines by age, one
    for prompts to compute, one for KV that arrives; within a line nobody overtakes, and memory goes to the older of the
    first two. When the horizon was too short and memory runs out, the youngest running sequence is preempted: its
    blocks are freed, and before any newcomer it is admitted again and computes its KV anew, in chunks like a prompt.
    The oldest running sequence therefore always advances, and every sequence ends.

    The prefix cache is offered what chunks of prompts compute. Answers are not cached.

    With `num_stages` pipeline stages, as many steps are under way at once, and share the budget: each takes its part of
    the decoding sequences, but at least `least_group` of them, and of the prompts' tokens. A sequence decodes in one of
    them at most; chunks of a prompt may follow each other. A sequence that takes part in a step under way is not
    preempted, and if it ends, its blocks stay allocated until the step is computed.
    """

    __slots__ = (
        "_block_size",
        "_cached_tokens",
        "_claims",
        "_computed_tokens",
        "_deadlines",
        "_decoding",
        "_index",
        "_least_group",
        "_leaving",
        "_line",
        "_memory_changed",
        "_next_order",
        "_num_stages",
        "_num_waiting",
        "_pool",
        "_predictor",
        "_preemptions",
        "_prompts",
        "_sequences",
        "_short_at",
        "_short_for",
        "_uncomputed_tokens",
        "_unreserved",
        "_unreserved_tokens",
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
        least_group: int = LEAST_GROUP,
    ) -> None:
        """`max_model_len` counts prompt plus answer; the attribute of that name is less where the pool is smaller.
        `predictor` tells how long steps take, for budgets that mix by slack; its owner corrects it."""
        self.budget = budget
        self._predictor = predictor
        self._num_stages = num_stages
        self._least_group = least_group
        self.max_model_len = min(max_model_len, pool.num_blocks * prefix_index.block_size)
        self._pool = pool
        self._index = prefix_index
        self._block_size = prefix_index.block_size
        self._sequences: dict[Hashable, Sequence] = {}
        self._deadlines: KeyedHeap[Hashable] = KeyedHeap()
        self._line: KeyedHeap[Hashable] = KeyedHeap()  # prompts that wait, and the preempted, by age
        self._unreserved: OrderedDict[Hashable, Sequence] = OrderedDict()  # KV from elsewhere, by age
        self._prompts: dict[Hashable, Sequence] = {}  # running, not decoding yet; admitted first comes first
        self._decoding: OrderedDict[Hashable, Sequence] = OrderedDict()  # running; the next to take part comes first
        self._claims = BlockClaims(budget, pool, prefix_index, self.max_model_len)
        self._leaving: set[Sequence] = set()  # that ended while a step with them was under way
        self._short_for: Hashable | None = None  # the first in line for which memory was too short,
        self._short_at = 0  # with this number of blocks available,
        self._memory_changed = False  # and whether it may fit since then though no more are available
        self._num_waiting = 0
        self._uncomputed_tokens = 0
        self._unreserved_tokens = 0
        self._next_order = 0
        self._computed_tokens = 0
        self._cached_tokens = 0
        self._preemptions = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def get(self, key: Hashable) -> Sequence | None:
        return self._sequences.get(key)

    def has_waiting_before(self, *, is_remote: bool) -> bool:
        """Whether a newcomer of that sort would wait behind others, so that it changes nothing before they leave. A
        prompt that waits to be computed does not hold back KV that comes from elsewhere while there is memory."""
        return len(self._unreserved) > 0 or (not is_remote and len(self._line) > 0)

    @property
    def has_unreserved(self) -> bool:
        """Whether a sequence waits for blocks for KV that comes from elsewhere."""
        return len(self._unreserved) > 0

    def length_limit(self, sequence: Sequence) -> int:
        """Tokens, prompt and answer together, with which it ends at the latest."""
        return min(sequence.request.max_total_tokens, self.max_model_len)

    def set_budget(self, budget: StepBudget) -> None:
        """From the next step on. What runs goes on, even where the new budget would not have admitted it."""
        self.budget = budget
        self._memory_changed = True
        self._claims.set_budget(budget)
        for key in self._claims.by_key:
            self._claims.claim(self._sequences[key])

    # --- coming in ---------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue it. Raises ContextLengthError if it can never fit, OverloadedError if the queue is full."""
        assert sequence.key not in self._sequences, f"{sequence.key!r} is scheduled already"
        if sequence.num_tokens >= self.max_model_len:
            raise ContextLengthError(
                f"The prompt has {sequence.num_tokens} tokens; this model takes at most {self.max_model_len} tokens,"
                " prompt and answer together."
            )
        if self._num_waiting + len(self._unreserved) >= self.budget.max_queue:
            raise OverloadedError("The queue of this instance is full; try again later.")
        self._sequences[sequence.key] = sequence
        if sequence.request.deadline_s != float("inf"):
            self._deadlines.push(sequence.key, sequence.request.deadline_s)
        sequence.order = self._next_order
        self._next_order += 1
        if sequence.is_remote:
            self._unreserved[sequence.key] = sequence
            self._unreserved_tokens += sequence.num_tokens
        else:
            self._line.push(sequence.key, sequence.order)
            self._num_waiting += 1
            self._uncomputed_tokens += sequence.num_tokens

    def reserve(self, now_s: float) -> list[Sequence]:
        """Give those that wait for KV from elsewhere their blocks, first come first served, while claims fit.

        End what is `expired` first. No newcomer is admitted while a preempted sequence waits.
        """
        reserved: list[Sequence] = []
        while self._unreserved and len(self._line) == self._num_waiting:
            sequence = next(iter(self._unreserved.values()))
            first = self._line.peek()
            if first is not None and first[1] == self._short_for and first[0] < sequence.order:
                break
            count = self._claims.blocks_for(sequence.num_tokens)
            if not self._claims.fits(sequence, count):
                break
            self._index.ensure_free(count)
            self._leave(sequence)
            self._claims.hold(sequence, self._pool.allocate(count))
            sequence.move_to(SequenceState.RECEIVING)
            reserved.append(sequence)
        return reserved

    def committed(self, key: Hashable, first_token_id: int, now_s: float) -> Sequence:
        """The KV of all tokens of the request is in the blocks; `first_token_id` is what prefill drew from it."""
        sequence = self._sequences[key]
        assert sequence.state is SequenceState.RECEIVING, "a transfer into blocks that were not reserved"
        sequence.num_computed = sequence.num_tokens
        sequence.committed_s = sequence.first_token_s = now_s
        sequence.append(first_token_id)
        sequence.move_to(SequenceState.RUNNING)
        self._decoding[key] = sequence
        self._claims.claim(sequence)
        return sequence

    # --- stepping ----------------------------------------------------------------------------------------------------

    def next_batch(self, now_s: float) -> list[Chunk]:
        """The chunks of the next step, decoding sequences first. Call `computed` or `launched` before asking again.

        When more sequences decode than `max_batch`, they take turns. Each chunk's blocks are in its sequence's block
        table. Empty when nothing runs and nothing can be admitted, or all waits for steps under way.
        """
        budget = self.budget
        max_prefill_tokens = self._share(budget.max_prefill_tokens)
        if budget.mixing == "prompt_first":
            return self._prompt_chunks(max_prefill_tokens, now_s) or self._decode_chunks()
        chunks = self._decode_chunks()
        left = min(max_prefill_tokens, self._share(budget.max_batch_tokens) - len(chunks))
        if left > 0 and (self._prompts or self._line):
            if budget.mixing == "slack" and self._predictor is not None and chunks:
                start = next(iter(self._prompts.values())).num_computed if self._prompts else 0
                decoding = [chunk.sequence for chunk in chunks]
                if self._num_stages > 1:  # the prediction is for a round of all stages
                    decoding = list(self._decoding.values())
                most = max_prompt_tokens(decoding, start, left * self._num_stages, now_s, self._predictor)
                left = self._share(most)
            chunks += self._prompt_chunks(left, now_s)
        return chunks

    def launched(self, chunks: Iterable[Chunk]) -> None:
        """Their step is under way. Chunks that follow them may be in the next step; `computed` comes for each."""
        for chunk in chunks:
            self._advance(chunk)
            chunk.sequence.num_under_way += 1

    def computed(self, chunk: Chunk) -> bool:
        """The KV of `chunk` is in its blocks. False when the sequence is gone meanwhile: drop the chunk's result.

        Steps are computed in the order in which they were launched.
        """
        sequence = chunk.sequence
        if self._sequences.get(sequence.key) is not sequence:
            if sequence in self._leaving:
                self._end_step(sequence)
            return False
        if sequence.num_under_way:
            sequence.num_under_way -= 1
        else:
            self._advance(chunk)
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
            self._memory_changed = True  # the first in line may find more of its prompt cached
            if chunk.samples and sequence.hand_over:
                self._remove(sequence)
                sequence.move_to(SequenceState.HELD)
        return True

    def generated(self, key: Hashable, token_id: int) -> Sequence:
        """Append the token drawn after a chunk that samples. Ask the sequence's `finish_reason_after` next.

        The caller sets `first_token_s` with the first one."""
        sequence = self._sequences[key]
        assert sequence.num_uncomputed == 0, "a token drawn from a place that is not the end"
        sequence.append(token_id)
        if self._prompts and self._prompts.pop(key, None) is not None:
            self._decoding[key] = sequence
        self._claims.claim(sequence)
        return sequence

    # --- going out ---------------------------------------------------------------------------------------------------

    def finish(self, key: Hashable) -> Sequence:
        """It has its last token: free its blocks."""
        sequence = self._sequences[key]
        self._end(sequence)
        return sequence

    def cancel(self, key: Hashable) -> Sequence | None:
        """Drop it in any state and free its blocks, after the steps under way with it. None when it is not here.

        Not while a transfer may still write into its blocks: `detach` it then.
        """
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._end(sequence)
        return sequence

    def detach(self, key: Hashable) -> list[int]:
        """Drop it, but keep its blocks allocated: the caller releases them to the pool once nobody writes there."""
        sequence = self._sequences[key]
        self._remove(sequence)
        sequence.move_to(SequenceState.FINISHED)
        return sequence.take_blocks()

    def release(self, sequence: Sequence) -> None:
        """Free a HELD sequence: its KV was fetched, or is wanted by nobody."""
        self._pool.release(sequence.take_blocks())
        sequence.move_to(SequenceState.FINISHED)

    def expired(self, now_s: float) -> list[Sequence]:
        """Sequences whose deadline has passed, each reported once, nothing freed: `cancel` or `detach` each now."""
        return [self._sequences[key] for key in self._deadlines.pop_until(now_s)]

    # --- for status and tests ----------------------------------------------------------------------------------------

    def counts(self) -> SchedulerCounts:
        return SchedulerCounts(
            waiting=self._num_waiting,
            unreserved=len(self._unreserved),
            receiving=len(self._claims.by_key) - len(self._prompts) - len(self._decoding),
            prompts=len(self._prompts),
            decoding=len(self._decoding),
            preempted=len(self._line) - self._num_waiting,
            uncomputed_tokens=self._uncomputed_tokens,
            unreserved_tokens=self._unreserved_tokens,
            computed_tokens=self._computed_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=self._preemptions,
        )

    @property
    def num_held_blocks(self) -> int:
        """Sum of the lengths of `block_tables`. O(1), but for those that are about to leave."""
        return self._claims.num_held + sum(len(sequence.block_table) for sequence in self._leaving)

    def block_tables(self) -> list[BlockTable]:
        claiming = (self._sequences[key] for key in self._claims.by_key)
        return [sequence.block_table for sequence in (*claiming, *self._leaving)]

    def check_integrity(self, other_owners: Iterable[BlockTable] = ()) -> None:
        """Every held block is a live sequence's or one of `other_owners` (held for a reader, or still written by a
        transfer that was given up); assert, O(num_blocks)."""
        in_line = [sequence for sequence in self._sequences.values() if sequence.key in self._line]
        running = (*self._prompts.values(), *self._decoding.values())
        assert len(in_line) == len(self._line)
        assert len(self._sequences) == len(in_line) + len(self._unreserved) + len(self._claims.by_key)
        assert self._num_waiting == sum(sequence.state is SequenceState.WAITING for sequence in in_line)
        assert all(sequence.state is SequenceState.RUNNING for sequence in running)
        for sequence in self._decoding.values():
            assert sequence.num_uncomputed + sequence.num_under_way == 1, "decoding with a gap"
        assert self._uncomputed_tokens == sum(s.num_uncomputed for s in (*in_line, *self._prompts.values()))
        assert self._unreserved_tokens == sum(sequence.num_tokens for sequence in self._unreserved.values())
        assert self._claims.num_claimed == sum(self._claims.by_key.values())
        assert self.num_held_blocks == sum(len(table) for table in self.block_tables())
        for key, claim in self._claims.by_key.items():
            assert len(self._sequences[key].block_table) <= claim, "a sequence holds more than it claims"
        self._index.check_integrity()
        check_blocks(self._pool, [*self.block_tables(), *other_owners])

    # --- batches -----------------------------------------------------------------------------------------------------

    def _advance(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        assert chunk.start == sequence.num_computed, "a chunk computed twice, or out of order"
        sequence.num_computed += chunk.num_tokens
        if chunk.is_prompt:
            self._uncomputed_tokens -= chunk.num_tokens

    def _share(self, amount: int) -> int:
        """Of one of the steps that are under way at once."""
        return -(-amount // self._num_stages)

    def _decode_chunks(self) -> list[Chunk]:
        """A token of each whose turn it is, and that is not preempted to make room for the others."""
        if not self._decoding:
            return []
        size, most = self._block_size, min(self.budget.max_batch, len(self._decoding))
        max_sequences = max(self._share(most), min(most, self._least_group))
        while True:
            candidates: Iterable[Sequence] = self._decoding.values()
            if self._num_stages > 1:
                candidates = (sequence for sequence in candidates if not sequence.num_under_way)
            picked = list(islice(candidates, max_sequences))
            growing = [sequence for sequence in picked if sequence.num_tokens > len(sequence.block_table) * size]
            if self._index.ensure_free(len(growing)):
                break
            running = chain(self._prompts.values(), self._decoding.values())
            youngest = max(running, key=lambda sequence: sequence.order)
            if youngest.num_under_way:  # it can be preempted after its step; until then the others wait
                picked = [sequence for sequence in picked if sequence not in growing]
                growing = []
                break
            self._preempt(youngest)
        for sequence in growing:
            sequence.block_table.extend(self._pool.allocate(1))
        self._claims.num_held += len(growing)
        chunks = [Chunk(sequence, sequence.num_computed, 1, samples=True, is_prompt=False) for sequence in picked]
        if len(chunks) < len(self._decoding):
            for chunk in chunks:
                self._decoding.move_to_end(chunk.sequence.key)
        return chunks

    def _prompt_chunks(self, max_tokens: int, now_s: float) -> list[Chunk]:
        """Of prompts that run, then of the first in line; at most `max_tokens`, or one whole prompt."""
        whole = self.budget.mixing == "prompt_first"
        max_running = min(self.budget.max_batch, self.budget.max_batch_tokens)  # each takes a token of a step at least
        chunks: list[Chunk] = []
        for sequence in self._prompts.values():
            if max_tokens > 0 and sequence.num_uncomputed:  # else its last chunk is under way
                chunks.append(prompt_chunk(sequence, sequence.num_uncomputed if whole else max_tokens))
                max_tokens -= chunks[-1].num_tokens
        while max_tokens > 0 and len(self._prompts) + len(self._decoding) < max_running:
            newcomer = self._admit_first(now_s, max_tokens if whole and chunks else None)
            if newcomer is None:
                break
            chunks.append(prompt_chunk(newcomer, newcomer.num_uncomputed if whole else max_tokens))
            max_tokens -= chunks[-1].num_tokens
        return chunks

    # --- memory ------------------------------------------------------------------------------------------------------

    @property
    def _first_is_blocked(self) -> bool:
        """Memory was too short for the first in line, and nothing has changed that."""
        first = self._line.peek()
        return (
            first is not None
            and first[1] == self._short_for
            and not self._memory_changed
            and self._index.num_available <= self._short_at
        )

    def _admit_first(self, now_s: float, max_uncomputed: int | None) -> Sequence | None:
        """Let the first in line run, if it fits and has at most `max_uncomputed` tokens to compute."""
        first = self._line.peek()
        if first is None or self._first_is_blocked:
            return None
        sequence = self._sequences[first[1]]
        if self._unreserved and next(iter(self._unreserved.values())).order < sequence.order:
            return None  # an older one waits for memory
        if not self._take_prompt_blocks(sequence, max_uncomputed):
            return None
        self._line.discard(sequence.key)
        self._num_waiting -= sequence.state is SequenceState.WAITING
        self._uncomputed_tokens -= sequence.num_cached
        self._cached_tokens += sequence.num_cached
        if sequence.started_s is None:
            sequence.started_s = now_s
        sequence.move_to(SequenceState.RUNNING)
        self._prompts[sequence.key] = sequence
        return sequence

    def _take_prompt_blocks(self, sequence: Sequence, max_uncomputed: int | None) -> bool:
        """Give `sequence` blocks for all its tokens, and count as computed what the prefix cache has of them.

        False, and nothing changed, when they do not fit, or when more than `max_uncomputed` tokens are left to compute.
        """
        cached: list[int] = []
        if sequence.request.sampling.prompt_logprobs is None:  # those need every prompt token to be computed
            cached = self._index.match(sequence.token_ids, sequence.request.cache_salt, sequence.block_hashes)
        num_missing = self._claims.blocks_for(sequence.num_tokens) - len(cached)
        num_cached = len(cached) * self._block_size
        too_many = max_uncomputed is not None and sequence.num_tokens - num_cached > max_uncomputed
        if too_many or not self._claims.fits(sequence, num_missing):
            self._pool.release(cached)
            if not too_many:
                self._short_for, self._short_at = sequence.key, self._index.num_available
                self._memory_changed = False
            return False
        self._index.ensure_free(num_missing)
        self._claims.hold(sequence, cached + self._pool.allocate(num_missing))
        sequence.num_cached = sequence.num_computed = num_cached
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._pool.release(sequence.take_blocks())
        sequence.move_to(SequenceState.PREEMPTED)
        self._line.push(sequence.key, sequence.order)
        self._uncomputed_tokens += sequence.num_tokens
        self._preemptions += 1

    def _end(self, sequence: Sequence) -> None:
        self._remove(sequence)
        sequence.move_to(SequenceState.FINISHED)
        if sequence.num_under_way:
            self._leaving.add(sequence)
        else:
            self._pool.release(sequence.take_blocks())

    def _end_step(self, sequence: Sequence) -> None:
        """A step with a sequence that is gone is computed: after the last one its blocks are free."""
        sequence.num_under_way -= 1
        if not sequence.num_under_way:
            self._leaving.discard(sequence)
            self._pool.release(sequence.take_blocks())
            self._memory_changed = True

    def _remove(self, sequence: Sequence) -> None:
        """Forget it; its blocks are the caller's."""
        self._leave(sequence)
        del self._sequences[sequence.key]
        self._deadlines.discard(sequence.key)

    def _leave(self, sequence: Sequence) -> None:
        """Take it out of the line or the batch it is in, and give up its claim."""
        key = sequence.key
        self._memory_changed = True
        self._claims.drop(sequence)
        if self._decoding.pop(key, None) is not None or sequence.state is SequenceState.RECEIVING:
            return
        if self._unreserved.pop(key, None) is not None:
            self._unreserved_tokens -= sequence.num_tokens
            return
        self._uncomputed_tokens -= sequence.num_uncomputed
        self._prompts.pop(key, None)
        self._line.discard(key)
        self._num_waiting -= sequence.state is SequenceState.WAITING

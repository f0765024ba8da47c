"""A scheduler that can take many equal steps at once, for a simulator, where tokens have no content."""

from bisect import bisect_right
from collections.abc import Hashable, Iterable

from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import StepBudget
from tandem.scheduling.chunk import Chunk
from tandem.scheduling.fast_forward import EvenBatch, FastForward, FullChunks
from tandem.scheduling.integrity import BlockTable
from tandem.scheduling.predictor import StepPredictor
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.scheduler import Scheduler
from tandem.scheduling.sequence import Sequence


class FastForwardScheduler(Scheduler):
    """Decides as `Scheduler` does. Between two steps these calls are possible, too:

        fast_forward()        -> for how many steps there is nothing to decide
        full_chunks()         -> for how many steps the first prompt takes the whole budget
        mixed_step(now)       -> the step of next_batch, with the decoding sequences as one value
        computed(chunk)       -> the prompt tokens of all steps of full_chunks, as one chunk
        advance(num_steps)    -> that many steps, or fewer; then finish(key) of each sequence that has ended

    Meanwhile the fields of sequences are old, until `get`, `next_batch` or `block_tables` is called. Sequences may have
    other block ids than after single steps, and every sampled token is 0.

    With several pipeline stages only `fast_forward` may be called, and only while no step is under way.
    """

    __slots__ = ("_batch", "_growth")

    def __init__(
        self,
        budget: StepBudget,
        pool: BlockPool,
        prefix_index: PrefixIndex,
        max_model_len: int,
        predictor: StepPredictor | None = None,
        num_stages: int = 1,
    ) -> None:
        super().__init__(budget, pool, prefix_index, max_model_len, predictor, num_stages)
        self._batch: EvenBatch | None = None  # all decoding sequences; None after a call that changed them
        self._growth: list[int] = []  # blocks that were allocated for the next step

    def fast_forward(self) -> FastForward | None:
        """The steps in which every decoding sequence computes one token: no sequence reaches its `length_limit` before
        the last of them, and none is admitted or preempted. None: call `next_batch`.

        O(1), except for the first call and after a call of `next_batch`.
        """
        waiting, running, budget = self._waiting, self._running, self.budget
        num_decoding = len(running.decoding)
        if running.prompts or not 0 < num_decoding <= budget.max_batch:
            return None
        if self._composer.divides(num_decoding):
            return None
        can_admit = num_decoding < min(budget.max_batch, budget.max_batch_tokens)
        if can_admit and waiting.num_prompts and not waiting.is_blocked:
            return None
        batch = self._even_batch()
        num_steps = self._steps_with_memory(batch, batch.steps_to_first_end)
        return FastForward(num_steps, num_decoding, batch.kv_tokens, batch.newcomers) if num_steps > 0 else None

    def full_chunks(self) -> FullChunks | None:
        """The steps with one chunk of the first prompt, which takes the whole budget, and one token of each decoding
        sequence: none is admitted or preempted, and none ends before the last of these steps. Afterwards the caller
        calls `computed` with one chunk, and `advance` if any sequence decodes. None: fewer than two steps, or for the
        reasons of `mixed_step`.

        O(1), as `fast_forward`.
        """
        budget, prompts, num_decoding = self.budget, self._running.prompts, len(self._running.decoding)
        num_tokens = min(budget.max_prefill_tokens, budget.max_batch_tokens - num_decoding)
        if budget.mixing != "chunked" or not prompts or num_decoding > budget.max_batch or num_tokens <= 0:
            return None
        sequence = next(iter(prompts.values()))
        num_steps = (sequence.num_uncomputed - 1) // num_tokens
        if num_steps < 2 or num_decoding == 0:
            return FullChunks(sequence, num_tokens, num_steps, None) if num_steps >= 2 else None
        batch = self._even_batch()
        num_steps = self._steps_with_memory(batch, min(num_steps, batch.steps_to_first_end))
        if num_steps < 2:
            return None
        self._take_growth(batch)
        beside = FastForward(num_steps, num_decoding, batch.kv_tokens, batch.newcomers)
        return FullChunks(sequence, num_tokens, num_steps, beside)

    def mixed_step(self, now_s: float) -> tuple[list[Chunk], FastForward] | None:
        """The step of `next_batch` with prompts beside all decoding sequences: chunks of prompts, and one step of the
        decoding sequences. When it ends, call `computed` for the chunks, and then `advance`. None: call `next_batch`,
        because sequences take turns, or are preempted, or chunks depend on the slack of each.

        O(chunks of prompts).
        """
        budget, num_decoding = self.budget, len(self._running.decoding)
        if budget.mixing != "chunked" or not 0 < num_decoding <= budget.max_batch:
            return None
        batch = self._even_batch()
        if not self._take_growth(batch):
            return None
        steps = FastForward(1, num_decoding, batch.kv_tokens, batch.newcomers)
        left = min(budget.max_prefill_tokens, budget.max_batch_tokens - num_decoding)
        return (self._composer.prompt_chunks(left, now_s) if left > 0 else []), steps

    def advance(self, num_steps: int) -> list[Sequence]:
        """Take `num_steps` steps, at most those of `fast_forward`, `full_chunks` or `mixed_step`. Returns the sequences
        that have reached their limit, in the order of their chunks; the caller calls `finish` for each."""
        batch = self._batch
        assert batch is not None, "ask `fast_forward` first"
        self._blocks.num_claimed -= batch.claimed_blocks
        count = batch.advance(num_steps)
        self._blocks.num_claimed += batch.claimed_blocks
        missing = count - len(self._growth)
        assert missing >= 0, "more blocks were allocated than the steps need"
        self._blocks.num_held += missing
        has_blocks = self._index.ensure_free(missing)
        assert has_blocks, "the steps were limited by memory"
        batch.loose_blocks.extend(self._growth)
        batch.loose_blocks.extend(self._pool.allocate(missing))
        self._growth = []
        self._computed_tokens += num_steps * len(batch)
        ended = batch.pop_ended()
        for sequence in ended:
            self._blocks.claims[sequence] = self._blocks.claim_of(sequence)
        return ended

    # --- calls that read single sequences, or change which of them run -----------------------------------------------

    def get(self, key: Hashable) -> Sequence | None:
        sequence = super().get(key)
        if sequence is not None:
            self._sync(sequence)
        return sequence

    def committed(self, key: Hashable, first_token_id: int, now_s: float) -> Sequence:
        sequence = super().committed(key, first_token_id, now_s)
        if self._batch is not None:
            self._batch.join(sequence, self.length_limit(sequence))
        return sequence

    def generated(self, key: Hashable, token_id: int) -> Sequence:
        was_prompt = key in self._running.prompts
        sequence = super().generated(key, token_id)
        limit = self.length_limit(sequence)
        if was_prompt and self._batch is not None and sequence.num_tokens < limit:
            self._batch.join(sequence, limit)
        return sequence

    def next_batch(self, now_s: float) -> list[Chunk]:
        self._end_batch()
        return super().next_batch(now_s)

    def cancel(self, key: Hashable) -> Sequence | None:
        if key in self._running.decoding:
            self._end_batch()
        return super().cancel(key)

    def block_tables(self) -> list[BlockTable]:
        self._end_batch()
        return super().block_tables()

    def check_integrity(self, other_owners: Iterable[BlockTable] = ()) -> None:
        self._end_batch()
        super().check_integrity(other_owners)

    def _even_batch(self) -> EvenBatch:
        if self._batch is None:
            self._batch = EvenBatch(self._blocks.block_size, self.budget.growth_horizon_tokens)
            for sequence in self._running.decoding.values():
                self._batch.join(sequence, self.length_limit(sequence))
        assert len(self._batch) == len(self._running.decoding), "a sequence at its limit has to be finished first"
        return self._batch

    def _steps_with_memory(self, batch: EvenBatch, num_steps: int) -> int:
        """The number of steps, at most `num_steps`, for which there is memory without a preemption."""
        available = self._index.num_available + batch.held_blocks
        if batch.blocks_after(num_steps) > available:
            return bisect_right(range(1, num_steps), available, key=batch.blocks_after)
        return num_steps

    def _take_growth(self, batch: EvenBatch) -> bool:
        """Allocate the blocks that the next step of the decoding sequences needs, as a step does when it begins. False:
        there are too few."""
        count = batch.blocks_after(1) - batch.held_blocks
        if not self._index.ensure_free(count):
            return False
        self._growth = self._pool.allocate(count)
        self._blocks.num_held += count
        return True

    def _sync(self, sequence: Sequence) -> None:
        if self._batch is not None and sequence.key in self._batch.synced:
            self._batch.sync(sequence)
            self._blocks.claims[sequence] = self._blocks.claim_of(sequence)

    def _end_batch(self) -> None:
        """Bring all sequences up to date; from here on their own fields count."""
        if self._batch is not None:
            for sequence in self._running.decoding.values():
                self._sync(sequence)
            assert not self._batch.loose_blocks, "a block that no sequence needs"
            self._batch = None
            self._pool.release(self._growth)  # of a step that did not end
            self._blocks.num_held -= len(self._growth)
            self._growth = []

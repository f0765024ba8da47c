"""Composes the next step of an instance: decoding sequences and chunks of prompts, within the budget."""

from collections.abc import Iterable
from itertools import islice

from tandem.scheduling.budget import StepBudget
from tandem.scheduling.chunk import Chunk, prompt_chunk
from tandem.scheduling.predictor import StepPredictor
from tandem.scheduling.running_sequences import RunningSequences
from tandem.scheduling.sequence import Sequence
from tandem.scheduling.sequence_blocks import SequenceBlocks
from tandem.scheduling.slack import max_prompt_tokens
from tandem.scheduling.waiting_sequences import WaitingSequences

MIN_GROUP = 16
"""Decoding sequences that are never divided among stages: a step of fewer takes as long as reading the weights."""


class BatchComposer:
    """Picks sequences for a step, admits waiting ones while they fit, and preempts running ones when memory runs out.

    The youngest running sequence is preempted: its blocks are freed, and it waits to recompute its KV. So the oldest
    sequence always advances, and every sequence ends.

    With `num_stages` pipeline stages, as many steps are under way at once and share the budget: each has its part of
    the decoding sequences, at least `min_group` of them, and its part of the prompt tokens. A sequence decodes in one
    of these steps at most, while consecutive chunks of a prompt may be in several. A sequence with a step under way is
    not preempted.
    """

    __slots__ = ("_blocks", "_min_group", "_num_stages", "_predictor", "_running", "_waiting", "budget")

    def __init__(
        self,
        budget: StepBudget,
        waiting: WaitingSequences,
        running: RunningSequences,
        blocks: SequenceBlocks,
        predictor: StepPredictor | None,
        num_stages: int,
        min_group: int,
    ) -> None:
        """`budget` may be replaced between two steps. Without `predictor`, "slack" is the same as "chunked"."""
        self.budget = budget
        self._waiting = waiting
        self._running = running
        self._blocks = blocks
        self._predictor = predictor
        self._num_stages = num_stages
        self._min_group = min_group

    def next_batch(self, now_s: float) -> list[Chunk]:
        """See `Scheduler.next_batch`."""
        budget, prompts = self.budget, self._running.prompts
        max_prefill_tokens = self._share(budget.max_prefill_tokens)
        if budget.mixing == "prompt_first":
            return self.prompt_chunks(max_prefill_tokens, now_s) or self._decode_chunks()
        chunks = self._decode_chunks()
        left = min(max_prefill_tokens, self._share(budget.max_batch_tokens) - len(chunks))
        if left > 0 and (prompts or self._waiting.num_prompts):
            if budget.mixing == "slack" and self._predictor is not None and chunks:
                left = self._within_slack(chunks, left, now_s, self._predictor)
            chunks += self.prompt_chunks(left, now_s)
        return chunks

    def prompt_chunks(self, max_tokens: int, now_s: float) -> list[Chunk]:
        """Chunks of running prompts, then of newly admitted ones: at most `max_tokens` tokens, or one whole prompt."""
        budget, running = self.budget, self._running
        is_whole = budget.mixing == "prompt_first"
        max_running = min(budget.max_batch, budget.max_batch_tokens)  # each needs at least a token of a step
        chunks: list[Chunk] = []
        for sequence in running.prompts.values():
            if max_tokens > 0 and sequence.num_uncomputed:  # else its last chunk is under way
                chunks.append(prompt_chunk(sequence, sequence.num_uncomputed if is_whole else max_tokens))
                max_tokens -= chunks[-1].num_tokens
        while max_tokens > 0 and len(running) < max_running:
            newcomer = self._admit_first(now_s, max_tokens if is_whole and chunks else None)
            if newcomer is None:
                break
            chunks.append(prompt_chunk(newcomer, newcomer.num_uncomputed if is_whole else max_tokens))
            max_tokens -= chunks[-1].num_tokens
        return chunks

    def divides(self, num_decoding: int) -> bool:
        """Whether `num_decoding` sequences are divided among several steps under way."""
        return self._num_stages > 1 and num_decoding > self._min_group

    def _admit_first(self, now_s: float, max_uncomputed: int | None) -> Sequence | None:
        """As `WaitingSequences.admit_first`; the sequence runs afterwards."""
        newcomer = self._waiting.admit_first(now_s, max_uncomputed)
        if newcomer is not None:
            self._running.start(newcomer)
        return newcomer

    def _decode_chunks(self) -> list[Chunk]:
        """One token of each decoding sequence whose turn it is, after preemptions if memory is short."""
        decoding = self._running.decoding
        if not decoding:
            return []
        most = min(self.budget.max_batch, len(decoding))
        max_sequences = max(self._share(most), min(most, self._min_group))
        while True:
            candidates: Iterable[Sequence] = decoding.values()
            if self._num_stages > 1:
                candidates = (sequence for sequence in candidates if not sequence.num_under_way)
            picked = list(islice(candidates, max_sequences))
            growing = self._blocks.growing(picked)
            if self._blocks.extend(growing):
                break
            youngest = self._running.youngest()
            if youngest.num_under_way:  # it is preempted after its step; until then the growing sequences wait
                picked = [sequence for sequence in picked if sequence not in growing]
                break
            self._preempt(youngest)
        chunks = [Chunk(sequence, sequence.num_computed, 1, samples=True, is_prompt=False) for sequence in picked]
        if len(chunks) < len(decoding):
            for sequence in picked:
                decoding.move_to_end(sequence.key)
        return chunks

    def _preempt(self, sequence: Sequence) -> None:
        self._running.discard(sequence)
        self._blocks.free(sequence)
        self._waiting.add_preempted(sequence)
        self._waiting.memory_changed()

    def _within_slack(self, chunks: list[Chunk], max_tokens: int, now_s: float, predictor: StepPredictor) -> int:
        """Prompt tokens that the slack of the decoding `chunks` allows in their step, at most `max_tokens`."""
        prompts, num_stages = self._running.prompts, self._num_stages
        start = next(iter(prompts.values())).num_computed if prompts else 0
        decoding = [chunk.sequence for chunk in chunks]
        if num_stages > 1:  # the prediction is for a round of all stages
            decoding = list(self._running.decoding.values())
        return self._share(max_prompt_tokens(decoding, start, max_tokens * num_stages, now_s, predictor))

    def _share(self, amount: int) -> int:
        """The part of `amount` for one of the steps that are under way at once, rounded up."""
        return -(-amount // self._num_stages)

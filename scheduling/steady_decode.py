"""A decode scheduler that also takes many steps at once, for a simulator, where tokens have no content."""

from bisect import bisect_right
from collections.abc import Hashable, Iterable

from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.decode import DecodeChunk, DecodePolicy, DecodeScheduler
from tandem.scheduling.integrity import BlockTable
from tandem.scheduling.sequence import Sequence
from tandem.scheduling.steady import SteadyBatch, SteadySteps


class SteadyDecodeScheduler(DecodeScheduler):
    """The same decisions as a `DecodeScheduler`'s, and between two steps also

        steady()                  -> for how long nothing is left to decide
        advance(num_steps, now)   -> so many steps, or fewer than there could be; then finish(key) of each that ended

    Meanwhile the sequences' own numbers lag behind, until `get`, `next_batch` or `block_tables` is asked.
    """

    __slots__ = ("_steady",)

    def __init__(self, policy: DecodePolicy, pool: BlockPool, block_size: int, max_model_len: int) -> None:
        super().__init__(policy, pool, block_size, max_model_len)
        self._steady: SteadyBatch | None = None  # holds all of _running while it is there

    def steady(self) -> SteadySteps | None:
        """How long every running sequence just computes one token per step: none reaches its `length_limit` before
        the last of these steps, none is preempted or admitted again. None: ask `next_batch`.

        O(1) from call to call, but for the first one and whenever `next_batch` was asked in between.
        """
        if not 0 < len(self._running) <= self._policy.max_batch or self._preempted:
            return None
        if self._steady is None:
            if any(sequence.num_uncomputed != 1 for sequence in self._running.values()):
                return None
            self._steady = SteadyBatch(self._block_size, self._policy.growth_horizon_tokens)
            for sequence in self._running.values():
                self._steady.join(sequence, self.length_limit(sequence))
        batch = self._steady
        assert len(batch) == len(self._running), "finish what has reached its limit"
        free_blocks = self._pool.num_free + batch.held_blocks
        num_steps = batch.steps_to_first_end
        if batch.blocks_after(num_steps) > free_blocks:
            num_steps = bisect_right(range(1, num_steps), free_blocks, key=batch.blocks_after)
        return SteadySteps(num_steps, len(batch), batch.kv_tokens, batch.newcomers) if num_steps > 0 else None

    def advance(self, num_steps: int, now_s: float) -> list[Sequence]:
        """The same as `num_steps` steps, at most those of `steady`, of which the first began at `now_s`; but for which
        block is whose, and every token drawn is 0. Returns the sequences that have reached their limit, in the order
        of their chunks: `finish` each now.
        """
        batch = self._steady
        assert batch is not None, "ask `steady` first"
        for sequence in batch.newcomers:
            sequence.started_s = now_s
        batch.newcomers = []
        self._claimed_blocks -= batch.claimed_blocks
        count = batch.advance(num_steps)
        self._claimed_blocks += batch.claimed_blocks
        self._held_blocks += count
        batch.loose_blocks.extend(self._pool.allocate(count))
        self._computed_tokens += num_steps * len(batch)
        ended = batch.pop_ended()
        for sequence in ended:
            self._claims[sequence.key] = self._claim_of(sequence)
        return ended

    # --- what looks at single sequences, or changes who runs ---------------------------------------------------------

    def get(self, key: Hashable) -> Sequence | None:
        sequence = super().get(key)
        if sequence is not None:
            self._sync(sequence)
        return sequence

    def committed(self, key: Hashable, first_token_id: int, now_s: float) -> Sequence:
        sequence = super().committed(key, first_token_id, now_s)
        if self._steady is not None:
            self._steady.join(sequence, self.length_limit(sequence))
        return sequence

    def next_batch(self, now_s: float) -> list[DecodeChunk]:
        self._end_steady()
        return super().next_batch(now_s)

    def cancel(self, key: Hashable) -> Sequence | None:
        if key in self._running:
            self._end_steady()
        return super().cancel(key)

    def block_tables(self) -> list[BlockTable]:
        self._end_steady()
        return super().block_tables()

    def check_integrity(self, other_owners: Iterable[BlockTable] = ()) -> None:
        self._end_steady()
        super().check_integrity(other_owners)

    def _sync(self, sequence: Sequence) -> None:
        if self._steady is not None and sequence.key in self._steady.synced:
            self._steady.sync(sequence)
            self._claims[sequence.key] = self._claim_of(sequence)

    def _end_steady(self) -> None:
        """From here on the sequences' own numbers count."""
        if self._steady is not None:
            for sequence in self._running.values():
                self._sync(sequence)
            assert not self._steady.loose_blocks, "a block that no sequence missed"
            self._steady = None

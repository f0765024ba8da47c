"""Blocks of attempts that are no longer scheduled: somebody else still reads or writes them."""

from collections import Counter

from tandem.core.attempt_id import AttemptId
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.integrity import BlockTable
from tandem.scheduling.sequence import Sequence


class KeptBlocks:
    """Two kinds, each until somebody says so: KV that is *held* for a reader, and blocks that are *fenced* because a
    cancelled transfer may still write into them."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._held: dict[AttemptId, Sequence] = {}  # from the last chunk of the prompt on
        self._held_in: Counter[int] = Counter()  # block -> how many of those have it
        self._fenced: dict[AttemptId, list[int]] = {}
        self.num_references = 0  # sum of the lengths of all their block tables

    def __bool__(self) -> bool:
        return bool(self._held or self._fenced)

    @property
    def num_held(self) -> int:
        """Blocks, each counted once, though several attempts may hold a cached prefix."""
        return len(self._held_in)

    def tables(self) -> list[BlockTable]:
        return [*(sequence.block_table for sequence in self._held.values()), *self._fenced.values()]

    def hold(self, attempt_id: AttemptId, sequence: Sequence) -> None:
        self._held[attempt_id] = sequence
        self._held_in.update(sequence.block_table)
        self.num_references += len(sequence.block_table)

    def end_hold(self, attempt_id: AttemptId) -> Sequence | None:
        """Its blocks are the caller's again. None if the attempt holds none."""
        held = self._held.pop(attempt_id, None)
        if held is not None:
            self.num_references -= len(held.block_table)
            for block_id in held.block_table:
                self._held_in[block_id] -= 1
                if not self._held_in[block_id]:
                    del self._held_in[block_id]
        return held

    def fence(self, attempt_id: AttemptId, block_ids: list[int]) -> None:
        self._fenced[attempt_id] = block_ids
        self.num_references += len(block_ids)

    def lift_fence(self, attempt_id: AttemptId) -> bool:
        """The transfer has ended: free its blocks. False if none of the attempt's were fenced."""
        block_ids = self._fenced.pop(attempt_id, None)
        if block_ids is not None:
            self.num_references -= len(block_ids)
            self._pool.release(block_ids)
        return block_ids is not None

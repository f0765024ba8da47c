"""Blocks of attempts that are no longer scheduled, but that a reader or a transfer still uses."""

from collections import Counter

from tandem.core.attempt_id import AttemptId
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.integrity import BlockTable
from tandem.scheduling.sequence import Sequence


class KeptBlocks:
    """*Held* KV waits for its reader until `end_hold`. *Fenced* blocks stay allocated until `lift_fence`, because a
    cancelled transfer may still write into them."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._held: dict[AttemptId, Sequence] = {}
        self._holders: Counter[int] = Counter()  # block id -> number of held sequences that have the block
        self._fenced: dict[AttemptId, list[int]] = {}
        self.num_references = 0  # sum of the lengths of all their block tables

    def __bool__(self) -> bool:
        return bool(self._held or self._fenced)

    @property
    def num_held(self) -> int:
        """Number of different held blocks; several attempts may hold the blocks of a cached prefix."""
        return len(self._holders)

    def tables(self) -> list[BlockTable]:
        return [*(sequence.block_table for sequence in self._held.values()), *self._fenced.values()]

    def hold(self, attempt_id: AttemptId, sequence: Sequence) -> None:
        """Hold the sequence's blocks for the reader of its KV."""
        self._held[attempt_id] = sequence
        self._holders.update(sequence.block_table)
        self.num_references += len(sequence.block_table)

    def end_hold(self, attempt_id: AttemptId) -> Sequence | None:
        """Returns the held sequence, whose blocks are the caller's again. None if the attempt holds none."""
        held = self._held.pop(attempt_id, None)
        if held is not None:
            self.num_references -= len(held.block_table)
            for block_id in held.block_table:
                self._holders[block_id] -= 1
                if not self._holders[block_id]:
                    del self._holders[block_id]
        return held

    def fence(self, attempt_id: AttemptId, block_ids: list[int]) -> None:
        """Keep the blocks of an ended attempt allocated until its transfer has ended."""
        self._fenced[attempt_id] = block_ids
        self.num_references += len(block_ids)

    def lift_fence(self, attempt_id: AttemptId) -> bool:
        """The transfer has ended: free the attempt's fenced blocks. False if it has none."""
        block_ids = self._fenced.pop(attempt_id, None)
        if block_ids is not None:
            self.num_references -= len(block_ids)
            self._pool.release(block_ids)
        return block_ids is not None

"""What admission counts with: the blocks that sequences hold, and those that they need when they grow."""

from collections.abc import Hashable

from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import StepBudget
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.sequence import Sequence


class BlockClaims:
    """Of the sequences that receive or run. A sequence claims the blocks that it holds at the end of its growth
    horizon. `num_held` is the sum of the lengths of their block tables, `num_claimed` the sum of `by_key`."""

    __slots__ = ("_block_size", "_budget", "_index", "_max_model_len", "_pool", "by_key", "num_claimed", "num_held")

    def __init__(self, budget: StepBudget, pool: BlockPool, prefix_index: PrefixIndex, max_model_len: int) -> None:
        self.by_key: dict[Hashable, int] = {}
        self.num_claimed = 0
        self.num_held = 0
        self._budget = budget
        self._pool = pool
        self._index = prefix_index
        self._block_size = prefix_index.block_size
        self._max_model_len = max_model_len

    def set_budget(self, budget: StepBudget) -> None:
        """`claim` for each sequence again afterwards."""
        self._budget = budget

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def claim_of(self, sequence: Sequence) -> int:
        """Blocks that it holds at the end of its growth horizon."""
        num_tokens = sequence.num_tokens
        if not sequence.hand_over:
            grown = num_tokens + self._budget.growth_horizon_tokens
            num_tokens = max(num_tokens, min(grown, sequence.request.max_total_tokens, self._max_model_len))
        return -(-num_tokens // self._block_size)

    def claim(self, sequence: Sequence) -> None:
        """Bring its claim up to date."""
        claim = self.claim_of(sequence)
        self.num_claimed += claim - self.by_key.get(sequence.key, 0)
        self.by_key[sequence.key] = claim

    def hold(self, sequence: Sequence, block_table: list[int]) -> None:
        """It was admitted with these blocks."""
        sequence.block_table = block_table
        self.num_held += len(block_table)
        self.claim(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Nothing happens if it has no claim."""
        if (claim := self.by_key.pop(sequence.key, None)) is not None:
            self.num_claimed -= claim
            self.num_held -= len(sequence.block_table)

    def fits(self, newcomer: Sequence, num_missing: int) -> bool:
        """Whether it can be given `num_missing` blocks, and all can grow."""
        growth = self.num_claimed - self.num_held + self.claim_of(newcomer) - self.blocks_for(newcomer.num_tokens)
        spare = int(self._budget.watermark * self._pool.num_blocks) if self.by_key else 0
        return num_missing + growth + spare <= self._index.num_available

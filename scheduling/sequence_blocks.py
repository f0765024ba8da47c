"""The KV blocks of an instance's sequences, and the blocks into which the sequences will grow."""

from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import StepBudget
from tandem.scheduling.integrity import BlockTable
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.sequence import Sequence


class SequenceBlocks:
    """Allocates and frees the block tables of receiving and running sequences.

    Each of them *claims* the blocks that it needs at the end of its growth horizon (`StepBudget`). A new sequence gets
    blocks only if its claim fits beside all others.

    A sequence may be freed while a step with it is under way, which still writes into its blocks. The sequence is then
    *leaving*: its blocks stay allocated until the step is computed.

    `claims` maps sequences to blocks; only `FastForwardScheduler` may change it. `num_claimed` is its sum, and
    `num_held` the sum of the lengths of these sequences' block tables.
    """

    __slots__ = (
        "_budget",
        "_index",
        "_leaving",
        "_max_model_len",
        "_pool",
        "block_size",
        "claims",
        "num_claimed",
        "num_held",
    )

    def __init__(self, budget: StepBudget, pool: BlockPool, prefix_index: PrefixIndex, max_model_len: int) -> None:
        self.claims: dict[Sequence, int] = {}
        self.num_claimed = 0
        self.num_held = 0
        self._budget = budget
        self._pool = pool
        self._index = prefix_index
        self.block_size = prefix_index.block_size
        self._max_model_len = max_model_len
        self._leaving: set[Sequence] = set()

    def set_budget(self, budget: StepBudget) -> None:
        """Sequences that have blocks keep them, even where the new budget would not have admitted them."""
        self._budget = budget
        for sequence in self.claims:
            self.update_claim(sequence)

    @property
    def num_available(self) -> int:
        """Blocks that are free, or that only the prefix cache holds."""
        return self._index.num_available

    # --- claims ------------------------------------------------------------------------------------------------------

    def claim_of(self, sequence: Sequence) -> int:
        """Blocks that the sequence needs at the end of its growth horizon."""
        num_tokens = sequence.num_tokens
        if not sequence.hand_over:
            grown = num_tokens + self._budget.growth_horizon_tokens
            num_tokens = max(num_tokens, min(grown, sequence.request.max_total_tokens, self._max_model_len))
        return self._blocks_for(num_tokens)

    def update_claim(self, sequence: Sequence) -> None:
        """The sequence's tokens or the budget have changed."""
        claim = self.claim_of(sequence)
        self.num_claimed += claim - self.claims.get(sequence, 0)
        self.claims[sequence] = claim

    # --- allocation --------------------------------------------------------------------------------------------------

    def find_cached(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest cached prefix, with references of the caller, who calls `give` or `give_back`."""
        if sequence.request.sampling.prompt_logprobs is not None:
            return []  # those need every prompt token to be computed
        return self._index.match(sequence.token_ids, sequence.request.cache_salt, sequence.block_hashes)

    def give_back(self, cached: list[int]) -> None:
        """Release blocks of `find_cached` that are not used."""
        self._pool.release(cached)

    def give(self, sequence: Sequence, cached: list[int]) -> bool:
        """Give a new sequence blocks for all its tokens. The first ones are `cached`, and their tokens count as
        computed. False, and nothing is changed, if its claim does not fit beside the others."""
        num_blocks = self._blocks_for(sequence.num_tokens)
        num_missing = num_blocks - len(cached)
        growth = self.num_claimed - self.num_held + self.claim_of(sequence) - num_blocks
        spare = int(self._budget.watermark * self._pool.num_blocks) if self.claims else 0
        if num_missing + growth + spare > self._index.num_available:
            return False
        self._index.ensure_free(num_missing)
        sequence.block_table = cached + self._pool.allocate(num_missing)
        sequence.num_cached = sequence.num_computed = len(cached) * self.block_size
        self.num_held += num_blocks
        self.update_claim(sequence)
        return True

    def growing(self, sequences: list[Sequence]) -> list[Sequence]:
        """The sequences whose last token needs one more block."""
        size = self.block_size
        return [sequence for sequence in sequences if sequence.num_tokens > len(sequence.block_table) * size]

    def extend(self, sequences: list[Sequence]) -> bool:
        """Give each sequence one more block. False, and nothing is changed, if there are too few."""
        if not self._index.ensure_free(len(sequences)):
            return False
        for sequence in sequences:
            sequence.block_table.extend(self._pool.allocate(1))
        self.num_held += len(sequences)
        return True

    # --- the end -----------------------------------------------------------------------------------------------------

    def drop(self, sequence: Sequence) -> None:
        """End the claim of the sequence, if it has one. The caller has to release its block table."""
        if (claim := self.claims.pop(sequence, None)) is not None:
            self.num_claimed -= claim
            self.num_held -= len(sequence.block_table)

    def free(self, sequence: Sequence) -> None:
        """End the claim of the sequence, and free its blocks once no step with it is under way."""
        self.drop(sequence)
        if sequence.num_under_way:
            self._leaving.add(sequence)
        else:
            self._pool.release(sequence.take_blocks())

    def end_step(self, sequence: Sequence) -> bool:
        """A step with the sequence is computed. True: it was leaving, and its blocks are free now."""
        if sequence not in self._leaving:
            return False
        sequence.num_under_way -= 1
        if sequence.num_under_way:
            return False
        self._leaving.discard(sequence)
        self._pool.release(sequence.take_blocks())
        return True

    # --- for status and tests ----------------------------------------------------------------------------------------

    @property
    def num_allocated(self) -> int:
        """Sum of the lengths of `tables`. O(leaving sequences)."""
        return self.num_held + sum(len(sequence.block_table) for sequence in self._leaving)

    def tables(self) -> list[BlockTable]:
        """Block tables of all sequences with blocks, leaving ones included."""
        return [sequence.block_table for sequence in (*self.claims, *self._leaving)]

    def check_integrity(self) -> None:
        """Assert that the sums are consistent. O(sequences)."""
        assert self.num_claimed == sum(self.claims.values())
        assert self.num_allocated == sum(len(table) for table in self.tables())
        for sequence, claim in self.claims.items():
            assert len(sequence.block_table) <= claim, "a sequence holds more than it claims"

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

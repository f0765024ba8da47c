"""Arithmetic of a batch in which every sequence gains one token per step, so that many steps cost as much as one.

The blocks that all sequences hold and claim after any number of steps follow from sums, which change only when a
sequence joins or leaves.
"""

import heapq
from collections.abc import Hashable
from typing import NamedTuple

from tandem.scheduling.sequence import Sequence


class FastForward(NamedTuple):
    """At least one and at most `max_steps` equal steps. The first one reads `kv_tokens` tokens of KV, new ones
    included, and each later one `num_sequences` more. The first step has the second token of each of `newcomers`."""

    max_steps: int
    num_sequences: int
    kv_tokens: int
    newcomers: list[Sequence]


class FullChunks(NamedTuple):
    """At least two and at most `max_steps` steps, each with the next `num_tokens` prompt tokens of `sequence`, whose
    prompt does not end in them. `beside` are the steps of the decoding sequences; None without these."""

    sequence: Sequence
    num_tokens: int
    max_steps: int
    beside: FastForward | None


class BlockGrowth:
    """The sum of ceil((start + step) / block_size) over a changing set of starts, for any step. O(block_size)."""

    __slots__ = ("_block_size", "_count", "_full", "_residues")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._count = 0
        self._full = 0
        self._residues = [0] * block_size

    def add(self, start: int, count: int = 1) -> None:
        """Add `count` sequences with that start; -1 removes one."""
        full, residue = divmod(start + self._block_size - 1, self._block_size)
        self._count += count
        self._full += count * full
        self._residues[residue] += count

    def at(self, step: int) -> int:
        """The sum for that step."""
        if self._count == 0:
            return 0
        full, part = divmod(step, self._block_size)
        # Starts whose residue and `part` together need one more block.
        return self._full + self._count * full + sum(self._residues[self._block_size - part :])


class EvenBatch:
    """All decoding sequences of a scheduler, while each computes one token per step and none leaves.

    The sequences' own fields are `step - synced[key]` steps old, while `held_blocks` and `claimed_blocks` are current.
    Blocks that were allocated since then are in `loose_blocks` until `sync` gives them to a sequence.
    """

    __slots__ = (
        "_block_size",
        "_claims",
        "_ends",
        "_held",
        "_horizon_tokens",
        "_next_number",
        "_settled_claims",
        "_settling",
        "_sum_starts",
        "held_blocks",
        "loose_blocks",
        "newcomers",
        "step",
        "synced",
    )

    def __init__(self, block_size: int, growth_horizon_tokens: int) -> None:
        self._block_size = block_size
        self._horizon_tokens = growth_horizon_tokens
        self._held = BlockGrowth(block_size)
        self._claims = BlockGrowth(block_size)  # of sequences whose growth horizon is below their limit
        self._settled_claims = 0  # of sequences that claim up to their limit
        self._settling: list[tuple[int, int, int]] = []  # heap of (step, start of the claim, claim from then on)
        self._ends: list[tuple[int, int, int, Sequence]] = []  # heap of (step, place in the batch, limit, sequence)
        self._next_number = 0
        self._sum_starts = 0
        self.step = 0
        self.synced: dict[Hashable, int] = {}
        self.held_blocks = 0
        self.loose_blocks: list[int] = []
        self.newcomers: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.synced)

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV that the next step reads, new ones included. Each later step reads `len(self)` more."""
        return self._sum_starts + len(self.synced) * self.step

    @property
    def claimed_blocks(self) -> int:
        return self._claims.at(self.step) + self._settled_claims

    @property
    def steps_to_first_end(self) -> int:
        """Number of steps after which the first sequence reaches its limit."""
        return self._ends[0][0] - self.step

    def blocks_after(self, num_steps: int) -> int:
        """Blocks held after `num_steps` more steps, at least one."""
        return self._held.at(self.step + num_steps)

    def join(self, sequence: Sequence, limit: int) -> None:
        """Add a sequence that has one token to compute, and ends with `limit` tokens."""
        start = sequence.num_tokens - self.step
        self._sum_starts += start
        self._held.add(start - 1)
        self.held_blocks += len(sequence.block_table)
        final_claim = -(-limit // self._block_size)
        settled_step = limit - self._horizon_tokens - start
        if settled_step > self.step:
            self._claims.add(start + self._horizon_tokens)
            heapq.heappush(self._settling, (settled_step, start + self._horizon_tokens, final_claim))
        else:
            self._settled_claims += final_claim
        heapq.heappush(self._ends, (limit - start, self._next_number, limit, sequence))
        self._next_number += 1
        self.synced[sequence.key] = self.step
        if sequence.num_tokens == len(sequence.request.token_ids) + 1:
            self.newcomers.append(sequence)

    def advance(self, num_steps: int) -> int:
        """Advance by at most `steps_to_first_end`. Returns the number of blocks that the steps need; the caller puts
        these into `loose_blocks`."""
        held_blocks = self.blocks_after(num_steps)
        count, self.held_blocks = held_blocks - self.held_blocks, held_blocks
        self.step += num_steps
        self.newcomers = []
        while self._settling and self._settling[0][0] <= self.step:
            _, start, final_claim = heapq.heappop(self._settling)
            self._claims.add(start, -1)
            self._settled_claims += final_claim
        return count

    def sync(self, sequence: Sequence) -> None:
        """Bring the sequence's fields up to date."""
        num_steps = self.step - self.synced[sequence.key]
        if num_steps > 0:
            self.synced[sequence.key] = self.step
            sequence.num_computed += num_steps
            sequence.extend([0] * num_steps)
            missing = -(-sequence.num_computed // self._block_size) - len(sequence.block_table)
            if missing > 0:
                sequence.block_table.extend(self.loose_blocks[-missing:])
                del self.loose_blocks[-missing:]

    def pop_ended(self) -> list[Sequence]:
        """Remove and return the sequences that have reached their limit, up to date, in the order of the batch."""
        ended = []
        while self._ends and self._ends[0][0] == self.step:
            _, _, limit, sequence = heapq.heappop(self._ends)
            self.sync(sequence)
            del self.synced[sequence.key]
            start = limit - self.step
            self._sum_starts -= start
            self._held.add(start - 1, -1)
            self.held_blocks -= len(sequence.block_table)
            self._settled_claims -= -(-limit // self._block_size)  # at its end every claim is settled
            ended.append(sequence)
        return ended

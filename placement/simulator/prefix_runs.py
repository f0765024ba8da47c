"""A prefix cache by runs of blocks: the same hits, evictions and memory as block by block, at the price of counting.

A simulated prompt consists of two chains of blocks: the first blocks of its group's common prefix, then blocks that it
shares with nobody. The cached blocks of a chain are always its first ones (`scheduling.prefix_index`: an owner of a
cached block also owns all blocks before it, and the last block is evicted first), so a number says which they are:

    chain   | held by sequences (the longest holding) | idle: runs, the deepest was released first |  not cached
            0                                      max(holders)                                   length

A prompt of 12,000 tokens costs a few operations instead of several for each of its 750 blocks.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from tandem.placement.simulator.counted import CountedPool
from tandem.scheduling.prefix_index import PrefixIndex, TokenIds


class PromptPath(NamedTuple):
    """The blocks of a prompt: `num_shared` blocks of the chain `group`, then those of its own chain, that of `row`."""

    group: int
    num_shared: int
    row: int


@dataclass(slots=True, eq=False)
class _Chain:
    """`length` blocks are cached. `holders`: how many sequences hold so many of its first blocks. `idle` runs are what
    nobody holds, the deepest first. A `cleared` chain is not in the cache any more, but sequences hold blocks of it."""

    key: int  # that of a group, or -2 - row
    length: int = 0
    holders: dict[int, int] = field(default_factory=dict)
    idle: list["_Run"] = field(default_factory=list)
    cleared: bool = False

    @property
    def num_held(self) -> int:
        return max(self.holders, default=0)


@dataclass(slots=True, eq=False)
class _Run:
    """Blocks [`low`, `high`) of a chain, released together."""

    chain: _Chain
    low: int
    high: int


@dataclass(slots=True)
class _Holding:
    """What a sequence holds of the cache: the first `count` blocks of its path."""

    path: PromptPath
    shared: _Chain
    own: _Chain
    count: int


class RunPool(CountedPool):
    """A pool and its prefix cache. A block table has a 0 for each block; where blocks of the cache are among them, the
    first entry is the number of the holding."""

    __slots__ = ("_chains", "_holdings", "_idle", "_next_number", "_num_idle")

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._num_idle = 0
        self._chains: dict[int, _Chain] = {}  # those with cached blocks, by key
        self._holdings: dict[int, _Holding] = {}
        self._next_number = 1
        self._idle: OrderedDict[_Run, None] = OrderedDict()  # the first is evicted first

    @property
    def num_free(self) -> int:
        return self.num_blocks - self._num_held - self._num_idle

    @property
    def num_reclaimable(self) -> int:
        return self._num_idle

    @property
    def num_cached(self) -> int:
        """Blocks in the cache, those that sequences hold included. O(chains)."""
        return sum(chain.length for chain in self._chains.values())

    def can_allocate(self, count: int) -> bool:
        return count <= self.num_free

    def release(self, block_ids: list[int] | tuple[int, ...]) -> None:
        holding = self._holdings.pop(block_ids[0], None) if block_ids else None
        if holding is None:
            super().release(block_ids)
            return
        super().release(block_ids[holding.count :])
        num_shared = min(holding.count, holding.path.num_shared)
        self._drop(holding.own, holding.count - num_shared)  # the last blocks first
        self._drop(holding.shared, num_shared)

    # --- for the index -----------------------------------------------------------------------------------------------

    def hold(self, path: PromptPath, max_blocks: int) -> list[int]:
        """The cached blocks among the first `max_blocks` of the path, as the beginning of a block table."""
        shared, own = self._chain(path.group), self._chain(-2 - path.row)
        num_shared = min(max_blocks, path.num_shared, shared.length)
        num_own = min(max_blocks - num_shared, own.length) if num_shared == path.num_shared else 0
        if num_shared + num_own == 0:
            return []
        self._take(shared, num_shared)
        self._take(own, num_own)
        holding = _Holding(path, shared, own, num_shared + num_own)
        return [self._number(holding), *[0] * (holding.count - 1)]

    def cache(self, path: PromptPath, block_table: list[int], first: int, end: int) -> None:
        """Cache blocks [`first`, `end`) of the path, which are computed; earlier calls did so for the blocks before
        them. It ends at the first block that is in the cache already."""
        if first == end:
            return
        holding = self._holdings.get(block_table[0])
        if holding is None:
            holding = _Holding(path, self._chain(path.group), self._chain(-2 - path.row), 0)
        if holding.count != first or holding.shared.cleared or holding.own.cleared:
            return  # the block before `first` is not in the cache, or that in the cache is another sequence's
        if first < path.num_shared:
            holding.count = self._extend(holding.shared, first, min(end, path.num_shared))
        if path.num_shared <= holding.count < end:
            num_own = self._extend(holding.own, holding.count - path.num_shared, end - path.num_shared)
            holding.count = path.num_shared + num_own
        if holding.count > 0 and block_table[0] == 0:
            block_table[0] = self._number(holding)

    def reclaim(self, count: int) -> None:
        """Evict `count` idle blocks."""
        assert count <= self._num_idle
        self._num_idle -= count
        while count > 0:
            run = next(iter(self._idle))
            chain = run.chain
            assert chain.idle[0] is run, "the oldest run of a chain is its deepest"
            num_blocks = min(count, run.high - run.low)
            count -= num_blocks
            run.high -= num_blocks
            chain.length -= num_blocks
            if run.high == run.low:
                del self._idle[run]
                del chain.idle[0]
                if chain.length == 0:
                    del self._chains[chain.key]

    def clear(self) -> None:
        """Empty the cache. Blocks that sequences hold become free when they are released."""
        for chain in self._chains.values():
            chain.cleared = True
        self._chains.clear()
        self._idle.clear()
        self._num_idle = 0

    def check_integrity(self) -> None:
        for chain in self._chains.values():
            position = chain.num_held
            for run in reversed(chain.idle):
                assert run.chain is chain
                assert run.low == position < run.high, "idle runs continue what is held"
                position = run.high
            assert position == chain.length > 0
        assert self._num_idle == sum(run.high - run.low for run in self._idle)
        assert self._num_idle == sum(chain.length - chain.num_held for chain in self._chains.values())
        assert self.num_free >= 0

    # --- chains ------------------------------------------------------------------------------------------------------

    def _number(self, holding: _Holding) -> int:
        number = self._next_number
        self._next_number += 1
        self._holdings[number] = holding
        return number

    def _chain(self, key: int) -> _Chain:
        """A new one joins the cache with its first block."""
        return self._chains.get(key) or _Chain(key)

    def _extend(self, chain: _Chain, first: int, end: int) -> int:
        """Cache blocks [`first`, `end`) of a sequence that holds the `first` before; returns how many it holds then."""
        if chain.length != first or self._chains.setdefault(chain.key, chain) is not chain:
            return first  # another sequence's blocks are there
        chain.length = end
        if first > 0:
            self._count_holder(chain, first, -1)
        self._count_holder(chain, end, 1)
        return end

    def _take(self, chain: _Chain, count: int) -> None:
        """One more sequence holds its first `count` blocks."""
        if count == 0:
            return
        while chain.idle and chain.idle[-1].low < count:
            run = chain.idle[-1]
            num_blocks = min(count, run.high) - run.low
            self._num_idle -= num_blocks
            self._num_held += num_blocks
            run.low += num_blocks
            if run.low == run.high:
                del self._idle[run]
                chain.idle.pop()
        self._count_holder(chain, count, 1)

    def _drop(self, chain: _Chain, count: int) -> None:
        """One sequence less holds its first `count` blocks. Those that nobody holds now are idle."""
        if count == 0:
            return
        self._count_holder(chain, count, -1)
        num_held = chain.num_held
        if num_held >= count:
            return
        self._num_held -= count - num_held
        if not chain.cleared:
            run = _Run(chain, num_held, count)
            chain.idle.append(run)
            self._idle[run] = None
            self._num_idle += count - num_held

    @staticmethod
    def _count_holder(chain: _Chain, count: int, change: int) -> None:
        holders = chain.holders.get(count, 0) + change
        if holders:
            chain.holders[count] = holders
        else:
            del chain.holders[count]


class RunIndex(PrefixIndex):
    """The index of a `RunPool`. What the scheduler passes as names of blocks is the `PromptPath`."""

    __slots__ = ("_runs",)

    def __init__(self, pool: RunPool, block_size: int) -> None:
        super().__init__(pool, block_size)
        self._runs = pool

    @property
    def num_blocks(self) -> int:
        return self._runs.num_cached

    def match(self, token_ids: TokenIds, salt: str, hashes: list[bytes] | None = None) -> list[int]:
        return self._runs.hold(cast(PromptPath, hashes), (len(token_ids) - 1) // self.block_size)

    def insert(
        self,
        token_ids: TokenIds,
        block_table: list[int],
        num_computed: int,
        salt: str,
        hashes: list[bytes] | None = None,
        start: int = 0,
    ) -> None:
        path, size = cast(PromptPath, hashes), self.block_size
        self._runs.cache(path, block_table, start // size, num_computed // size)

    def evict(self, count: int) -> int:
        count = max(0, min(count, self._runs.num_reclaimable))
        self._runs.reclaim(count)
        return count

    def clear(self) -> None:
        self._runs.clear()

    def check_integrity(self) -> None:
        self._runs.check_integrity()

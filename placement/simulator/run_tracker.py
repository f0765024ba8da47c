"""The router's estimate of cached prefixes by runs of blocks: what `PrefixTracker` has, at the price of counting."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import overload

from tandem.scheduling.prefix_tracker import PrefixTracker


class SharedBlocks(Sequence[Hashable]):
    """Names of the first `num_blocks` blocks of a group's common prefix: (group, position)."""

    __slots__ = ("group", "num_blocks")

    def __init__(self, group: int, num_blocks: int) -> None:
        self.group = group
        self.num_blocks = num_blocks

    def __len__(self) -> int:
        return self.num_blocks

    @overload
    def __getitem__(self, index: int) -> Hashable: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Hashable]: ...
    def __getitem__(self, index: int | slice) -> Hashable | Sequence[Hashable]:
        positions = range(self.num_blocks)[index]
        return (self.group, positions) if isinstance(positions, int) else [(self.group, i) for i in positions]


@dataclass(slots=True, eq=False)
class _Run:
    """Blocks [`low`, `high`) of a group that an instance used at the same time."""

    group: int
    low: int
    high: int


class RunTracker(PrefixTracker):
    """Names are `SharedBlocks`. What an instance has of a group are runs that follow each other, the deepest one used
    least recently; the least recently used one of all its runs loses its last blocks first."""

    __slots__ = ("_num_blocks", "_runs", "_stacks")

    def __init__(self, block_size: int, max_blocks_per_instance: int) -> None:
        super().__init__(block_size, max_blocks_per_instance)
        self._runs: dict[str, OrderedDict[_Run, None]] = {}  # by instance, the least recently used first
        self._stacks: dict[int, dict[str, list[_Run]]] = {}  # by group and instance, the deepest first
        self._num_blocks: dict[str, int] = {}

    def matched_tokens(self, instance_id: str, names: Sequence[Hashable]) -> int:
        assert isinstance(names, SharedBlocks)
        stack = self._stacks.get(names.group, {}).get(instance_id)
        return min(stack[0].high, names.num_blocks) * self._block_size if stack else 0

    def holders(self, names: Sequence[Hashable]) -> Iterator[tuple[int, Set[str]]]:
        assert isinstance(names, SharedBlocks)
        stacks = self._stacks.get(names.group, {})
        known = {instance_id: min(stack[0].high, names.num_blocks) for instance_id, stack in stacks.items()}
        for count in sorted(set(known.values()), reverse=True):
            if count > 0:
                yield count * self._block_size, {each for each, blocks in known.items() if blocks >= count}

    def record(self, instance_id: str, names: Sequence[Hashable], num_pool_blocks: int) -> None:
        assert isinstance(names, SharedBlocks)
        runs = self._runs.setdefault(instance_id, OrderedDict())
        if names.num_blocks > 0:
            stack = self._stacks.setdefault(names.group, {}).setdefault(instance_id, [])
            num_known = stack[0].high if stack else 0
            while stack and stack[-1].low < names.num_blocks:
                run = stack[-1]
                run.low = min(names.num_blocks, run.high)
                if run.low == run.high:
                    del runs[stack.pop()]
            run = _Run(names.group, 0, names.num_blocks)
            stack.append(run)
            runs[run] = None
            self._num_blocks[instance_id] = self.num_blocks(instance_id) + max(0, names.num_blocks - num_known)
        max_blocks = min(num_pool_blocks, self._max_blocks)
        self._drop_oldest(instance_id, self.num_blocks(instance_id) - max_blocks)

    def forget(self, instance_id: str) -> None:
        for group in {run.group for run in self._runs.pop(instance_id, ())}:
            self._forget_group(group, instance_id)
        self._num_blocks.pop(instance_id, None)

    def num_blocks(self, instance_id: str) -> int:
        return self._num_blocks.get(instance_id, 0)

    def _drop_oldest(self, instance_id: str, count: int) -> None:
        runs = self._runs[instance_id]
        while count > 0:
            run = next(iter(runs))
            num_blocks = min(count, run.high - run.low)
            count -= num_blocks
            run.high -= num_blocks
            self._num_blocks[instance_id] -= num_blocks
            if run.low == run.high:
                stack = self._stacks[run.group][instance_id]
                assert stack[0] is run, "the oldest run of a group is its deepest"
                del stack[0], runs[run]
                if not stack:
                    self._forget_group(run.group, instance_id)

    def _forget_group(self, group: int, instance_id: str) -> None:
        stacks = self._stacks[group]
        del stacks[instance_id]
        if not stacks:
            del self._stacks[group]

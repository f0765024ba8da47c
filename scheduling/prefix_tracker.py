"""The router's guess of which instance has which prompt prefixes cached."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence, Set


class PrefixTracker:
    """Per instance, the names (see `prefix_index.block_hashes`) of the blocks it computed last.

    An approximation: the instance may have evicted a block, or hold more. It is bounded: at most
    `max_blocks_per_instance` names for each instance, least recently used out first.

    A name stands for its block and all blocks before it. Those are always used later than the block itself, and so stay
    for longer: whoever holds a name holds all before it. Holders are therefore found by bisection.
    """

    __slots__ = ("_block_size", "_blocks", "_holders", "_max_blocks")

    def __init__(self, block_size: int, max_blocks_per_instance: int) -> None:
        self._block_size = block_size
        self._max_blocks = max_blocks_per_instance
        self._blocks: dict[str, OrderedDict[Hashable, None]] = {}
        self._holders: dict[Hashable, set[str]] = {}

    def matched_tokens(self, instance_id: str, names: Sequence[Hashable]) -> int:
        """How many leading tokens of the prompt with these block names the instance has seen."""
        blocks = self._blocks.get(instance_id)
        if blocks is None:
            return 0
        matched = 0
        while matched < len(names) and names[matched] in blocks:
            matched += 1
        return matched * self._block_size

    def holders(self, names: Sequence[Hashable]) -> Iterator[tuple[int, Set[str]]]:
        """(tokens, all instances that have seen at least so many leading tokens), most tokens first; only where there
        is one more holder than before. Read it at once: the sets are live. O(log names) each."""
        depth, size = len(names), 0
        while True:
            low = 0  # so many leading names have more than `size` holders
            while low < depth:
                middle = (low + depth + 1) // 2
                if len(self._holders.get(names[middle - 1], ())) > size:
                    low = middle
                else:
                    depth = middle - 1
            if low == 0:
                return
            found = self._holders[names[low - 1]]
            yield low * self._block_size, found
            size, depth = len(found), low - 1

    def record(self, instance_id: str, names: Sequence[Hashable]) -> None:
        """The instance computes, or has found, this prompt."""
        blocks = self._blocks.setdefault(instance_id, OrderedDict())
        for name in reversed(names):  # so that the end of a prefix leaves before its beginning
            if name not in blocks:
                blocks[name] = None
                self._holders.setdefault(name, set()).add(instance_id)
            blocks.move_to_end(name)
        while len(blocks) > self._max_blocks:
            name, _ = blocks.popitem(last=False)
            self._drop(name, instance_id)

    def forget(self, instance_id: str) -> None:
        """The instance is gone; a restarted one has an empty cache and another id."""
        for name in self._blocks.pop(instance_id, ()):
            self._drop(name, instance_id)

    def num_blocks(self, instance_id: str) -> int:
        return len(self._blocks.get(instance_id, ()))

    def _drop(self, name: Hashable, instance_id: str) -> None:
        holders = self._holders[name]
        holders.discard(instance_id)
        if not holders:
            del self._holders[name]

"""The router's estimate of the prompt prefixes that each instance has cached."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence, Set


class PrefixTracker:
    """For each instance, the names (see `prefix_index.block_hashes`) of the blocks that it computed last.

    An approximation: an instance may have evicted a block, or may have more. Each instance has at most as many names as
    its pool has blocks, and at most `max_blocks_per_instance`; the least recently used names are dropped first.

    A name identifies a block and all blocks before it. Earlier blocks of a prompt are used at least as recently as
    later ones, so an instance with a name has all names before it. Bisection therefore finds the holders of a prefix.
    """

    __slots__ = ("_block_size", "_blocks", "_holders", "_max_blocks")

    def __init__(self, block_size: int, max_blocks_per_instance: int) -> None:
        self._block_size = block_size
        self._max_blocks = max_blocks_per_instance
        self._blocks: dict[str, OrderedDict[Hashable, None]] = {}
        self._holders: dict[Hashable, set[str]] = {}

    def matched_tokens(self, instance_id: str, names: Sequence[Hashable]) -> int:
        """How many leading tokens of the prompt with these block names the instance has computed."""
        blocks = self._blocks.get(instance_id)
        if blocks is None:
            return 0
        matched = 0
        while matched < len(names) and names[matched] in blocks:
            matched += 1
        return matched * self._block_size

    def holders(self, names: Sequence[Hashable]) -> Iterator[tuple[int, Set[str]]]:
        """Pairs (number of leading tokens, instances that have at least these), most tokens first; one pair for each
        length at which the number of instances grows. O(log names) for each pair.

        The sets belong to the tracker: read each of them before the next call.
        """
        depth, size = len(names), 0
        while True:
            low = 0  # the first `low` names have more than `size` holders
            while low < depth:
                middle = (low + depth + 1) // 2
                if len(self._holders.get(names[middle - 1], ())) > size:
                    low = middle
                else:
                    depth = middle - 1
            if low == 0:
                return
            instances = self._holders[names[low - 1]]
            yield low * self._block_size, instances
            size, depth = len(instances), low - 1

    def record(self, instance_id: str, names: Sequence[Hashable], num_pool_blocks: int) -> None:
        """The instance, whose pool has `num_pool_blocks` blocks, computes the prompt with these block names."""
        max_blocks = min(num_pool_blocks, self._max_blocks)
        blocks = self._blocks.setdefault(instance_id, OrderedDict())
        for name in reversed(names):  # so that the end of a prefix is dropped before its beginning
            if name not in blocks:
                blocks[name] = None
                self._holders.setdefault(name, set()).add(instance_id)
            blocks.move_to_end(name)
        while len(blocks) > max_blocks:
            name, _ = blocks.popitem(last=False)
            self._drop(name, instance_id)

    def forget(self, instance_id: str) -> None:
        """The instance is gone. A restarted instance has an empty cache and a new id."""
        for name in self._blocks.pop(instance_id, ()):
            self._drop(name, instance_id)

    def num_blocks(self, instance_id: str) -> int:
        return len(self._blocks.get(instance_id, ()))

    def _drop(self, name: Hashable, instance_id: str) -> None:
        holders = self._holders[name]
        holders.discard(instance_id)
        if not holders:
            del self._holders[name]

"""The router's guess of which instance has which prompt prefixes cached."""

from collections import OrderedDict


class PrefixTracker:
    """Per instance, the names (see `prefix_index.block_hashes`) of the blocks it computed last.

    An approximation: the instance may have evicted a block, or hold more. It is bounded: at most
    `max_blocks_per_instance` names for each instance, least recently used out first.
    """

    __slots__ = ("_block_size", "_blocks", "_max_blocks")

    def __init__(self, block_size: int, max_blocks_per_instance: int) -> None:
        self._block_size = block_size
        self._max_blocks = max_blocks_per_instance
        self._blocks: dict[str, OrderedDict[bytes, None]] = {}

    def matched_tokens(self, instance_id: str, hashes: list[bytes]) -> int:
        """How many leading tokens of the prompt with these block names the instance has seen. O(answer)."""
        blocks = self._blocks.get(instance_id)
        if blocks is None:
            return 0
        matched = 0
        while matched < len(hashes) and hashes[matched] in blocks:
            matched += 1
        return matched * self._block_size

    def record(self, instance_id: str, hashes: list[bytes]) -> None:
        """The instance computes, or has found, this prompt."""
        blocks = self._blocks.setdefault(instance_id, OrderedDict())
        for name in reversed(hashes):  # so that the end of a prefix leaves before its beginning
            blocks[name] = None
            blocks.move_to_end(name)
        while len(blocks) > self._max_blocks:
            blocks.popitem(last=False)

    def forget(self, instance_id: str) -> None:
        """The instance is gone; a restarted one has an empty cache and another id."""
        self._blocks.pop(instance_id, None)

    def num_blocks(self, instance_id: str) -> int:
        return len(self._blocks.get(instance_id, ()))

"""Shared prefixes, and the pools in which they are cached."""

from tandem.placement.simulator.counted import CountedPool
from tandem.placement.simulator.deployment import InstanceSpec
from tandem.placement.workload.requests import RequestStream
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.prefix_index import PrefixIndex


class BlockNames:
    """Names for blocks of a stream's requests, equal where their tokens are: within a group's common prefix.

    They stand in for the hash chains of `scheduling.prefix_index`, which need tokens to hash.
    """

    def __init__(self, requests: RequestStream, block_size: int) -> None:
        self._requests = requests
        self.block_size = block_size
        self._of_group: dict[int, list[bytes]] = {}

    def shared(self, row: int) -> list[bytes]:
        """Of the blocks that a request may have in common with others."""
        group = int(self._requests.prefix_group[row])
        if group < 0:
            return []
        count = int(self._requests.prefix_tokens[row]) // self.block_size
        names = self._of_group.setdefault(group, [])
        names.extend(b"%d/%d" % (group, i) for i in range(len(names), count))
        return names[:count]

    def shared_of_size(self, row: int, block_size: int) -> list[bytes]:
        """As `shared`; none of blocks of another size."""
        return self.shared(row) if block_size == self.block_size else []

    def of(self, row: int, num_tokens: int) -> list[bytes]:
        """Of all full blocks among its first `num_tokens` tokens."""
        names = self.shared(row)
        names.extend(b"own %d/%d" % (row, i) for i in range(len(names), num_tokens // self.block_size))
        return names


class CachingPool(BlockPool):
    """A pool with real block numbers that remembers the most it held."""

    __slots__ = ("peak_held",)

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.peak_held = 0

    def allocate(self, count: int) -> list[int]:
        block_ids = super().allocate(count)
        self.peak_held = max(self.peak_held, self.num_held)
        return block_ids


def pool_and_index(spec: InstanceSpec, names: BlockNames | None) -> tuple[CachingPool | CountedPool, PrefixIndex]:
    """With a cache where the instance has one and, by `names`, prompts have something to share."""
    if names is None or not spec.prefix_cache:
        pool = CountedPool(spec.num_blocks)
        return pool, PrefixIndex(pool, spec.block_size, enabled=False)
    assert spec.block_size == names.block_size, "instances that cache prefixes have one block size"
    caching = CachingPool(spec.num_blocks)
    return caching, PrefixIndex(caching, spec.block_size)

"""Shared prefixes, and the pools in which they are cached."""

from tandem.placement.simulator.counted import CountedPool
from tandem.placement.simulator.deployment import InstanceSpec
from tandem.placement.simulator.prefix_runs import PromptPath, RunIndex, RunPool
from tandem.placement.simulator.run_tracker import SharedBlocks
from tandem.placement.workload.requests import RequestStream
from tandem.scheduling.prefix_index import PrefixIndex


class BlockNames:
    """Names for blocks of a stream's requests, equal where their tokens are: within a group's common prefix.

    They stand in for the hash chains of `scheduling.prefix_index`, which need tokens to hash.
    """

    def __init__(self, requests: RequestStream, block_size: int) -> None:
        self.block_size = block_size
        self._group = requests.prefix_group.tolist()
        self._num_shared = (requests.prefix_tokens // block_size).tolist()

    def shared_of_size(self, row: int, block_size: int) -> SharedBlocks:
        """Of the blocks that a request may have in common with others, for the router; none of blocks of another
        size."""
        group = self._group[row]
        return SharedBlocks(group, self._num_shared[row] if group >= 0 and block_size == self.block_size else 0)

    def path(self, row: int) -> PromptPath:
        """All blocks of a request, for an instance's cache."""
        group = self._group[row]
        return PromptPath(group, self._num_shared[row] if group >= 0 else 0, row)


def pool_and_index(spec: InstanceSpec, names: BlockNames | None) -> tuple[CountedPool, PrefixIndex]:
    """With a cache where the instance has one and, by `names`, prompts have something to share."""
    if names is None or not spec.prefix_cache:
        pool = CountedPool(spec.num_blocks)
        return pool, PrefixIndex(pool, spec.block_size, enabled=False)
    assert spec.block_size == names.block_size, "instances that cache prefixes have one block size"
    caching = RunPool(spec.num_blocks)
    return caching, RunIndex(caching, spec.block_size)

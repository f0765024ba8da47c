"""Converts the chained block ids of a cache trace to the prefix groups of a RequestStream.

A block id identifies the block and all blocks before it, so the ids of a trace form a tree: all chats begin with the
same system prompt, and the second turn of a chat continues its first turn. A RequestStream has chains, not trees. The
tree is divided into heavy paths: each path continues with the child that most requests contain. A request belongs to
the path of its last shared block, with its complete prefix from the root.

Sharing along one path is kept, e.g. between the turns of a chat. Sharing between two paths is lost: the blocks above
the fork, once for each path.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tandem.placement.workload.requests import Ints

_BLOCK_SIZES = tuple(1 << power for power in range(12, 2, -1))


def prefix_groups(chains: Sequence[Sequence[int]], prompt_tokens: Ints) -> tuple[Ints, Ints]:
    """(prefix_group, prefix_tokens) of requests with the prompt blocks `chains`; -1 and 0 if no other request shares
    the first block. Raises ValueError if the chains are not complete prompts in blocks of one size."""
    block_size = _block_size(chains, prompt_tokens)
    visits = Counter(block for chain in chains for block in chain)
    shared = [_num_shared(chain, visits) for chain in chains]
    heavy_child = _heavy_children(chains, shared, visits)
    leaf_of: dict[int, int] = {}
    group_of_leaf: dict[int, int] = {}
    groups = np.full(len(chains), -1, dtype=np.int64)
    for i, chain in enumerate(chains):
        if shared[i]:
            leaf = _follow(chain[shared[i] - 1], heavy_child, leaf_of)
            groups[i] = group_of_leaf.setdefault(leaf, len(group_of_leaf))
    tokens = np.minimum(np.array(shared, dtype=np.int64) * block_size, prompt_tokens)
    return groups, tokens


def _block_size(chains: Sequence[Sequence[int]], prompt_tokens: Ints) -> int:
    counts = np.array([len(chain) for chain in chains])
    for last_block in (True, False):  # Mooncake also names a last block that is not full
        for size in _BLOCK_SIZES:
            if np.array_equal((prompt_tokens + (size - 1) * last_block) // size, counts):
                return size
    raise ValueError("hash_ids must name every block of the prompt, in blocks of one size from 8 to 4,096 tokens")


def _num_shared(chain: Sequence[int], visits: Counter[int]) -> int:
    """Number of leading blocks that another request also has. Visits never rise along a chain."""
    return next((depth for depth, block in enumerate(chain) if visits[block] < 2), len(chain))


def _heavy_children(chains: Sequence[Sequence[int]], shared: Sequence[int], visits: Counter[int]) -> dict[int, int]:
    heavy: dict[int, int] = {}
    for chain, depth in zip(chains, shared, strict=True):
        for parent, child in zip(chain[: depth - 1] if depth else (), chain[1:depth], strict=True):
            if parent not in heavy or visits[child] > visits[heavy[parent]]:
                heavy[parent] = child
    return heavy


def _follow(block: int, heavy_child: dict[int, int], leaf_of: dict[int, int]) -> int:
    """The last block of the path of `block`. Stores the result for the visited blocks in `leaf_of`."""
    walked = []
    while block not in leaf_of and block in heavy_child:
        walked.append(block)
        block = heavy_child[block]
    leaf = leaf_of.get(block, block)
    leaf_of.update(dict.fromkeys(walked, leaf))
    return leaf

"""From chained block ids, as a cache trace has them, to the prefix groups of a RequestStream.

A block's id stands for the block and for all before it, so the ids of a trace form a tree: a chat's second turn
continues its first, and all begin with the same system prompt. A RequestStream knows chains, not trees. The tree is
cut into heavy paths: from each block the path goes on to the child that most requests visit. A request joins the path
on which its last shared block lies, with its whole prefix from the root.

What is kept: all sharing along one path, e.g. between the turns of a chat. What is lost: sharing between two paths, at
most the blocks above where they part, once for each path.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tandem.placement.workload.requests import Ints

_BLOCK_SIZES = tuple(1 << power for power in range(12, 2, -1))


def prefix_groups(chains: Sequence[Sequence[int]], prompt_tokens: Ints) -> tuple[Ints, Ints]:
    """(prefix_group, prefix_tokens) of requests whose prompts are the blocks `chains`; -1 and 0 where no other request
    shares the first block. Raises ValueError if the chains are not whole prompts in blocks of one size."""
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
    for last_block in (True, False):  # Mooncake names the last block even when it is not full
        for size in _BLOCK_SIZES:
            if np.array_equal((prompt_tokens + (size - 1) * last_block) // size, counts):
                return size
    raise ValueError("hash_ids must name every block of the prompt, in blocks of one size from 8 to 4,096 tokens")


def _num_shared(chain: Sequence[int], visits: Counter[int]) -> int:
    """Leading blocks that another request has too. Visits never rise along a chain."""
    return next((depth for depth, block in enumerate(chain) if visits[block] < 2), len(chain))


def _heavy_children(chains: Sequence[Sequence[int]], shared: Sequence[int], visits: Counter[int]) -> dict[int, int]:
    heavy: dict[int, int] = {}
    for chain, depth in zip(chains, shared, strict=True):
        for parent, child in zip(chain[: depth - 1] if depth else (), chain[1:depth], strict=True):
            if parent not in heavy or visits[child] > visits[heavy[parent]]:
                heavy[parent] = child
    return heavy


def _follow(block: int, heavy_child: dict[int, int], leaf_of: dict[int, int]) -> int:
    """The last block of the path that `block` lies on; what was walked is remembered in `leaf_of`."""
    walked = []
    while block not in leaf_of and block in heavy_child:
        walked.append(block)
        block = heavy_child[block]
    leaf = leaf_of.get(block, block)
    leaf_of.update(dict.fromkeys(walked, leaf))
    return leaf

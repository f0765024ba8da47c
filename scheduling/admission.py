"""How a prompt gets its blocks, some of them from the prefix cache."""

from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.sequence import Sequence


def take_prompt_blocks(
    sequence: Sequence, pool: BlockPool, index: PrefixIndex, *, spare_blocks: int = 0, max_uncomputed: int | None = None
) -> bool:
    """Give `sequence`, which has none, blocks for all its tokens, and count as computed what the cache has of them.

    False, and nothing changed, when fewer than `spare_blocks` would be left to others, or more than `max_uncomputed`
    tokens would have to be computed.
    """
    assert not sequence.block_table, "a sequence takes its blocks once"
    cached: list[int] = []
    if sequence.request.sampling.prompt_logprobs is None:  # those need every prompt token to be computed
        cached = index.match(sequence.token_ids, sequence.request.cache_salt, sequence.block_hashes)
    missing = -(-sequence.num_tokens // index.block_size) - len(cached)
    num_cached = len(cached) * index.block_size
    too_many = max_uncomputed is not None and sequence.num_tokens - num_cached > max_uncomputed
    if too_many or missing + spare_blocks > index.num_available:
        pool.release(cached)
        return False
    index.make_room(missing)
    sequence.block_table = cached + pool.allocate(missing)
    sequence.num_cached = sequence.num_computed = num_cached
    return True

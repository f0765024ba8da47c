"""Self-check of an instance's blocks: each allocated block belongs to a live sequence, a lease or the prefix cache."""

from collections import Counter
from collections.abc import Iterable

from tandem.core.session import BlockCounts
from tandem.scheduling.block_pool import BlockPool

BlockTable = list[int] | tuple[int, ...]


def check_blocks(pool: BlockPool, owners: Iterable[BlockTable]) -> None:
    """Assert that every block has one reference for each of its `owners`. O(num_blocks): for tests and idle instances.

    `owners` are the block tables of all live sequences, leases and cancelled transfers that may still write.
    """
    pool.check_integrity()
    owned = Counter(block_id for table in owners for block_id in table)
    for block_id in range(pool.num_blocks):
        held = pool.references(block_id)
        assert held == owned[block_id], f"block {block_id} has {held} references and {owned[block_id]} owners"


def count_blocks(pool: BlockPool, num_owned: int, num_leased: int) -> BlockCounts:
    """Blocks by owner, for the heartbeat. O(1). A block of a running sequence and a lease counts as leased.

    `num_owned` is the sum of the lengths of all owners' block tables. Each owner has one reference to each of its
    blocks, so a difference from the pool's number of references is a leak. `num_leased` counts the different blocks
    under lease.
    """
    others = pool.num_held - num_leased
    leaked = min(abs(pool.num_references - num_owned), others)
    return BlockCounts(
        total=pool.num_blocks,
        free=pool.num_free,
        running=others - leaked,
        cached=pool.num_reclaimable,
        leased=num_leased,
        leaked=leaked,
    )

"""Self-check of an instance's blocks: allocated = owned by a live sequence, a lease or the prefix cache."""

from collections import Counter
from collections.abc import Iterable

from tandem.core.session import BlockCounts
from tandem.scheduling.block_pool import BlockPool

BlockTable = list[int] | tuple[int, ...]


def check_blocks(pool: BlockPool, owners: Iterable[BlockTable]) -> None:
    """Assert that the references of every block are exactly those of `owners`. O(num_blocks): for tests and when idle.

    `owners` are the block tables of all live sequences, leases and cancelled transfers that may still write.
    """
    pool.check_integrity()
    owned = Counter(block_id for table in owners for block_id in table)
    for block_id in range(pool.num_blocks):
        held = pool.references(block_id)
        assert held == owned[block_id], f"block {block_id} has {held} references and {owned[block_id]} owners"


def count_blocks(pool: BlockPool, running: Iterable[BlockTable], leased: Iterable[BlockTable] = ()) -> BlockCounts:
    """Blocks by owner, for the heartbeat. A block that is running and leased counts as running. O(blocks owned).

    `running` are the block tables of sequences and of cancelled transfers that may still write.
    """
    in_sequences = {block_id for table in running for block_id in table}
    in_leases = {block_id for table in leased for block_id in table} - in_sequences
    return BlockCounts(
        total=pool.num_blocks,
        free=pool.num_free,
        running=len(in_sequences),
        cached=pool.num_reclaimable,
        leased=len(in_leases),
        leaked=pool.num_held - len(in_sequences) - len(in_leases),
    )

"""Reference counts of KV blocks, by block number. The KV memory itself belongs to the engine."""

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Blocks `0 .. num_blocks - 1`. Each is in exactly one of three states:

        free          no owner
        held          one or more owners (sequences, leases, cancelled transfers), each with one reference
        reclaimable   no owner, but the prefix cache keeps the content for reuse

        free --allocate--> held --last release--> free            reclaimable --share--> held
                                \\--last release, if kept--> reclaimable --reclaim_oldest--> free

    All calls are O(1) per block. `release` starts at the end of a block table. In the order of reclaimable blocks, a
    block thus comes before the blocks that it continues, and the oldest is always a leaf of the prefix cache.
    """

    __slots__ = ("_free", "_kept", "_reclaimable", "_references", "num_blocks", "num_references")

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, "a pool has at least one block"
        self.num_blocks = num_blocks
        self.num_references = 0  # of all blocks together
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._kept = bytearray(num_blocks)
        self._reclaimable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_reclaimable(self) -> int:
        return len(self._reclaimable)

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free) - len(self._reclaimable)

    def references(self, block_id: int) -> int:
        return self._references[block_id]

    def can_allocate(self, count: int) -> bool:
        """Whether `count` blocks are free now, without eviction of cached content."""
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` free blocks, each with one reference, which is the caller's. `can_allocate` must be True."""
        assert self.can_allocate(count), f"{count} blocks requested, {len(self._free)} free"
        taken = [self._free.pop() for _ in range(count)]
        for block_id in taken:
            self._references[block_id] = 1
        self.num_references += count
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """Add one reference to each block. The blocks are held or reclaimable."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                assert block_id in self._reclaimable, f"block {block_id} is free and cannot be shared"
                del self._reclaimable[block_id]
            self._references[block_id] += 1
            self.num_references += 1

    def release(self, block_ids: list[int] | tuple[int, ...]) -> None:
        """Remove one reference from each block. The blocks are held."""
        self.num_references -= len(block_ids)
        for block_id in reversed(block_ids):
            assert self._references[block_id] > 0, f"block {block_id} released twice"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                if self._kept[block_id]:
                    self._reclaimable[block_id] = None
                else:
                    self._free.append(block_id)

    # --- for the prefix cache ----------------------------------------------------------------------------------------

    @property
    def num_kept(self) -> int:
        """Blocks that the prefix cache keeps. O(num_blocks)."""
        return self._kept.count(1)

    def is_kept(self, block_id: int) -> bool:
        return bool(self._kept[block_id])

    def keep(self, block_id: int) -> None:
        """After its last release, `block_id` becomes reclaimable instead of free."""
        assert self._references[block_id] > 0, f"block {block_id} is not held"
        self._kept[block_id] = 1

    def forget(self, block_id: int) -> None:
        """Undo `keep`: the block becomes free, at once or at its last release."""
        self._kept[block_id] = 0
        if block_id in self._reclaimable:
            del self._reclaimable[block_id]
            self._free.append(block_id)

    def reclaim_oldest(self) -> int:
        """Free the block that has been reclaimable for longest; returns its id."""
        block_id, _ = self._reclaimable.popitem(last=False)
        self._kept[block_id] = 0
        self._free.append(block_id)
        return block_id

    def check_integrity(self) -> None:
        """Assert that every block is in exactly one state. O(num_blocks)."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._reclaimable.keys(), "a block is both free and reclaimable"
        assert self.num_references == sum(self._references), "the sum of references is wrong"
        for block_id in range(self.num_blocks):
            idle = block_id in free or block_id in self._reclaimable
            assert idle == (self._references[block_id] == 0), f"block {block_id} is held and idle at once, or neither"
            assert block_id not in free or not self._kept[block_id], f"block {block_id} is free and kept"

"""The prefix cache's index: blocks by the token prefix whose KV they end, so that equal prefixes are computed once.

The name of a full block is the SHA-256 of the name of the block before it and its own token ids. Before the first block
stands the hash of the tenant's salt, so that only requests with equal salts share blocks.
"""

import hashlib
from array import array
from dataclasses import dataclass

from tandem.scheduling.block_pool import BlockPool

TokenIds = list[int] | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksCached:
    """Consecutive blocks were added to the cache. `parent` is the name of the block before them, None at the beginning
    of a prompt. `token_ids` are those of all these blocks."""

    names: tuple[bytes, ...]
    parent: bytes | None
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksEvicted:
    """Blocks were removed from the cache."""

    names: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """All blocks were removed from the cache."""


CacheChange = BlocksCached | BlocksEvicted | CacheCleared


def extend_block_hashes(hashes: list[bytes], token_ids: TokenIds, block_size: int, salt: str, num_blocks: int) -> None:
    """Extend `hashes`, the names of the first `len(hashes)` blocks of `token_ids`, to `num_blocks` names."""
    if len(hashes) >= num_blocks:
        return
    parent = hashes[-1] if hashes else hashlib.sha256(salt.encode()).digest()
    for i in range(len(hashes), num_blocks):
        block = array("I", token_ids[i * block_size : (i + 1) * block_size])
        assert len(block) == block_size, "only full blocks have names"
        parent = hashlib.sha256(parent + block.tobytes()).digest()
        hashes.append(parent)


def block_hashes(token_ids: TokenIds, block_size: int, salt: str) -> list[bytes]:
    """Names of all full blocks of `token_ids`, in order."""
    hashes: list[bytes] = []
    extend_block_hashes(hashes, token_ids, block_size, salt, len(token_ids) // block_size)
    return hashes


class PrefixIndex:
    """The prefix cache of one pool. With `enabled` False it finds and keeps nothing. With `records_changes`, changes of
    the cache are recorded for `take_changes`, except those of requests with a salt, whose prefixes are private.

    An owner of a cached block also owns all blocks before it. `insert` ensures this: it stops at the first block whose
    content another block caches already. The pool's oldest reclaimable block is therefore always a leaf of the cache,
    and every reclaimable block can be evicted.
    """

    __slots__ = (
        "_block_of",
        "_changes",
        "_name_of",
        "_pool",
        "block_size",
        "enabled",
    )

    def __init__(
        self, pool: BlockPool, block_size: int, enabled: bool = True, *, records_changes: bool = False
    ) -> None:
        assert block_size > 0
        self._pool = pool
        self.block_size = block_size
        self.enabled = enabled
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._changes: list[CacheChange] | None = [] if records_changes else None

    @property
    def num_blocks(self) -> int:
        """Cached blocks, those that sequences hold included."""
        return len(self._name_of)

    @property
    def num_available(self) -> int:
        """The most blocks that `ensure_free` can provide."""
        return self._pool.num_free + self._pool.num_reclaimable

    def match(self, token_ids: TokenIds, salt: str, hashes: list[bytes] | None = None) -> list[int]:
        """Blocks of the longest cached prefix, in order, each with a new reference that is the caller's.

        At least one token of `token_ids` is left to compute. `hashes` are the names of these tokens' first blocks, as
        far as they are known, and are extended in place.
        """
        if not self.enabled:
            return []
        hashes = [] if hashes is None else hashes
        matched: list[int] = []
        for i in range((len(token_ids) - 1) // self.block_size):
            extend_block_hashes(hashes, token_ids, self.block_size, salt, i + 1)
            block_id = self._block_of.get(hashes[i])
            if block_id is None:
                break
            matched.append(block_id)
        self._pool.share(matched)
        return matched

    def insert(
        self,
        token_ids: TokenIds,
        block_table: list[int],
        num_computed: int,
        salt: str,
        hashes: list[bytes] | None = None,
        start: int = 0,
    ) -> None:
        """Cache the full blocks of the first `num_computed` tokens, whose KV is in `block_table`.

        The caller holds these blocks. Earlier calls have inserted the blocks before token `start`.
        """
        if not self.enabled:
            return
        hashes = [] if hashes is None else hashes
        first, end = start // self.block_size, num_computed // self.block_size
        extend_block_hashes(hashes, token_ids, self.block_size, salt, end)
        if first > 0 and self._block_of.get(hashes[first - 1]) != block_table[first - 1]:
            return
        new = []
        for i in range(first, end):
            owner = self._block_of.setdefault(hashes[i], block_table[i])
            if owner != block_table[i]:
                break
            if block_table[i] not in self._name_of:
                self._name_of[block_table[i]] = hashes[i]
                self._pool.keep(block_table[i])
                new.append(i)
        if new and self._changes is not None and not salt:
            begin, end = new[0], new[-1] + 1
            assert end - begin == len(new), "a block is cached after all blocks before it"
            tokens = tuple(token_ids[begin * self.block_size : end * self.block_size])
            self._changes.append(BlocksCached(tuple(hashes[begin:end]), hashes[begin - 1] if begin else None, tokens))

    def ensure_free(self, count: int) -> bool:
        """Evict until `count` blocks are free. False, and nothing is evicted, if that is impossible."""
        if count > self.num_available:
            return False
        self.evict(count - self._pool.num_free)
        return True

    def evict(self, count: int) -> int:
        """Free up to `count` reclaimable blocks, least recently used first. Returns the number of freed blocks."""
        count = min(count, self._pool.num_reclaimable)
        evicted = [self._name_of.pop(self._pool.reclaim_oldest()) for _ in range(count)]
        for name in evicted:
            del self._block_of[name]
        if evicted and self._changes is not None:
            self._changes.append(BlocksEvicted(tuple(evicted)))
        return max(count, 0)

    def clear(self) -> None:
        """Empty the cache. Blocks that sequences hold become free at their last release."""
        for block_id in self._name_of:
            self._pool.forget(block_id)
        self._block_of.clear()
        self._name_of.clear()
        if self._changes is not None:
            self._changes.append(CacheCleared())

    def take_changes(self) -> list[CacheChange]:
        """Changes since the last call, in order; none without `records_changes`."""
        changes = self._changes or []
        if self._changes:
            self._changes = []
        return changes

    def check_integrity(self) -> None:
        """Assert that names and blocks correspond one to one, and that every reclaimable block has a name."""
        assert len(self._block_of) == len(self._name_of), "a name without its block, or the reverse"
        for block_id, name in self._name_of.items():
            assert self._block_of[name] == block_id, f"block {block_id} is cached under a name of another"
            assert self._pool.is_kept(block_id), f"block {block_id} is cached and not kept"
        assert self._pool.num_kept == len(self._name_of), "a block is kept that the cache does not know"

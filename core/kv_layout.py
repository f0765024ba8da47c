"""Order and size of KV blocks in an instance's memory, and the fingerprint that instances compare before a transfer.

One pool per rank, one contiguous allocation:

    pool[layer, kv, block, kv_head, slot, head_dim]          kv: 0 = keys, 1 = values

A block is `block_size` token slots of one sequence, the unit of allocation and transfer. For one layer, one of K or V
and one block, the bytes `[kv_head, slot, head_dim]` are contiguous, and so is any range of heads inside them: a source
with another tensor- or pipeline-parallel degree can be read without repacking.
"""

import hashlib
from dataclasses import dataclass

LAYOUT_VERSION = 3

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of one rank's KV pool.

    `weights_hash` identifies the checkpoint's content, so that instances with different weights do not exchange KV.
    `rope_factors` names what rotated the keys where the checkpoint leaves that to the engine: "long" for longrope's
    long factors, which follow an engine's `max_model_len`, else "".

    `rank_share` names the part of the model's KV that the pool of one of several ranks holds; "" is all of it.

    Kernels and processors are not part of it: they round differently, and KV of one can be used by the other.
    """

    num_layers: int
    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: str
    weights_hash: str
    rope_factors: str = ""
    rank_share: str = ""

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """(layer, kv, block, kv_head, slot, head_dim)"""
        return (self.num_layers, 2, self.num_blocks, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def segment_bytes(self) -> int:
        """Bytes of one block of K or of V in one layer: the longest contiguous run."""
        return self.num_kv_heads * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, K and V."""
        return self.num_layers * 2 * self.segment_bytes

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks needed to hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    @property
    def fingerprint(self) -> str:
        """32 hex digits; equal if blocks of one pool can be used in the other. The number of blocks may differ."""
        parts = (
            LAYOUT_VERSION,
            self.weights_hash,
            self.dtype,
            self.block_size,
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            self.rope_factors,
            self.rank_share,
        )
        return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:32]

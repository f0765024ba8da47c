"""Order and size of KV blocks in an instance's memory, and the fingerprint that instances compare before a transfer.

One pool per rank, one contiguous allocation:

    pool[layer, kv, block, kv_head, slot, head_dim]          kv: 0 = keys, 1 = values

A block is `block_size` token slots of one sequence, the unit of allocation. For one layer, one of K or V and one block,
the bytes `[kv_head, slot, head_dim]` are contiguous, and so is any range of heads inside them, and any range of slots
of one head.

An instance of several ranks has a pool on each rank: tensor parallelism divides the KV heads, pipeline parallelism the
layers, both into consecutive ranges. With more tensor-parallel ranks than KV heads each head is on several ranks
(replicas). Block ids and `block_size` are the same on all ranks of an instance.
"""

import hashlib
from dataclasses import dataclass, replace

from tandem.core.parallel import kv_heads_of

LAYOUT_VERSION = 4  # of the order above, and of which heads a rank holds

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The KV of one instance: a model's, in `num_blocks` blocks, over one pool or the pools of several ranks.

    `num_layers` and `num_kv_heads` are the model's. `weights_hash` identifies the checkpoint's content, so that
    instances with different weights do not exchange KV. `rope_factors` names what rotated the keys where the checkpoint
    leaves that to the engine: "long" for longrope's long factors, which follow an engine's `max_model_len`, else "".

    `tp` ranks divide the heads of each pipeline stage; `layers_per_stage` has the stages' numbers of layers, and is
    empty for a single stage. Ranks count tensor-parallel first: rank = stage * tp + its number within the stage.

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
    tp: int = 1
    layers_per_stage: tuple[int, ...] = ()

    @property
    def num_ranks(self) -> int:
        return self.tp * max(1, len(self.layers_per_stage))

    def layers(self, rank: int) -> range:
        """The model's layers whose KV that rank holds."""
        if not self.layers_per_stage:
            return range(self.num_layers)
        stage = rank // self.tp
        first = sum(self.layers_per_stage[:stage])
        return range(first, first + self.layers_per_stage[stage])

    def heads(self, rank: int) -> range:
        """The model's KV heads that rank holds."""
        return kv_heads_of(self.num_kv_heads, self.tp, rank % self.tp)

    def pool_of(self, rank: int) -> "KvLayout":
        """The layout of that rank's pool: the same blocks, with the rank's layers and heads."""
        if self.num_ranks == 1:
            return self
        num_layers, num_heads = len(self.layers(rank)), len(self.heads(rank))
        return replace(self, num_layers=num_layers, num_kv_heads=num_heads, tp=1, layers_per_stage=())

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """(layer, kv, block, kv_head, slot, head_dim)"""
        return (self.num_layers, 2, self.num_blocks, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def segment_bytes(self) -> int:
        """Bytes of one block of K or of V in one layer: the longest contiguous run of a single pool."""
        return self.num_kv_heads * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers and heads, K and V. Replicas do not count."""
        return self.num_layers * 2 * self.segment_bytes

    @property
    def pool_bytes(self) -> int:
        """Bytes of a single pool that holds everything."""
        return self.num_blocks * self.block_bytes

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks needed to hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    @property
    def fingerprint(self) -> str:
        """32 hex digits of what KV is, wherever it is: equal if KV of one instance can be used by the other.

        How it is spread over blocks and ranks is not part of it: `kv_transfer.reshard` moves KV between any two shapes.
        """
        parts = (
            LAYOUT_VERSION,
            self.weights_hash,
            self.dtype,
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            self.rope_factors,
        )
        return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:32]

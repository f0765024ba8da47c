"""The dimensions of a model that determine its cost and memory. No checkpoint is needed.

`core.model_spec.ModelSpec` describes a model that the engine can compute. A ModelShape covers more models (mixtures of
experts, latent attention) with less detail (no RoPE, no epsilon). Counts of weights are exact matrix sizes; norms and
biases, less than 0.1 % of any model, are left out.
"""

from dataclasses import dataclass

from tandem.core.model_spec import ModelSpec
from tandem.core.parallel import ParallelShape


@dataclass(frozen=True, slots=True)
class MoeShape:
    """A mixture of experts. A token uses `top_k` of `num_experts` routed experts of `intermediate_size`.

    `num_shared` experts compute every token. The first `dense_layers` layers have a plain MLP instead.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    num_shared: int = 0
    dense_layers: int = 0


@dataclass(frozen=True, slots=True)
class MlaShape:
    """Multi-head latent attention (DeepSeek-V2): a token caches one latent of `kv_lora_rank` and a shared RoPE key."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int = 0  # 0: the query projection is one matrix


@dataclass(frozen=True, slots=True)
class ModelShape:
    """`num_positions` is the size of a learned position table, 0 for rotary models. A gated MLP has three matrices,
    another MLP two. `weight_bytes`, `table_bytes` (embeddings and head) and `kv_bytes` are the bytes of one stored
    number."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context_tokens: int
    gated_mlp: bool = True
    tied_embeddings: bool = False
    num_positions: int = 0
    moe: MoeShape | None = None
    mla: MlaShape | None = None
    weight_bytes: float = 2.0
    table_bytes: float = 2.0
    kv_bytes: float = 2.0

    @classmethod
    def from_spec(cls, name: str, spec: ModelSpec, dtype_bytes: int) -> "ModelShape":
        """The shape of a checkpoint with numbers of `dtype_bytes` bytes."""
        return cls(
            name=name,
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            intermediate_size=spec.intermediate_size,
            vocab_size=spec.vocab_size,
            max_context_tokens=spec.max_context_tokens,
            gated_mlp=spec.family != "opt",
            tied_embeddings=spec.tie_word_embeddings,
            num_positions=spec.max_position_embeddings if spec.rope is None else 0,
            weight_bytes=float(dtype_bytes),
            table_bytes=float(dtype_bytes),
            kv_bytes=float(dtype_bytes),
        )

    # --- weights -----------------------------------------------------------------------------------------------------

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's attention projections."""
        hidden, heads = self.hidden_size, self.num_heads
        if (mla := self.mla) is not None:
            query_width = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
            query = (
                hidden * mla.q_lora_rank + mla.q_lora_rank * query_width if mla.q_lora_rank else hidden * query_width
            )
            down = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
            up = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
            return query + down + up + heads * mla.v_head_dim * hidden
        return hidden * self.head_dim * (2 * heads + 2 * self.num_kv_heads)

    def mlp_weights(self, intermediate_size: int) -> int:
        """Weights of one plain MLP or one expert."""
        return (3 if self.gated_mlp else 2) * self.hidden_size * intermediate_size

    @property
    def num_moe_layers(self) -> int:
        return 0 if self.moe is None else self.num_layers - self.moe.dense_layers

    @property
    def moe_layer_weights(self) -> int:
        """Weights of one mixture layer, experts and expert router; 0 for a dense model."""
        if self.moe is None:
            return 0
        experts = self.moe.num_experts + self.moe.num_shared
        return experts * self.mlp_weights(self.moe.intermediate_size) + self.hidden_size * self.moe.num_experts

    @property
    def layer_weights(self) -> int:
        """Weights of all layers with all experts."""
        dense = (self.num_layers - self.num_moe_layers) * self.mlp_weights(self.intermediate_size)
        return self.num_layers * self.attention_weights + dense + self.num_moe_layers * self.moe_layer_weights

    @property
    def num_parameters(self) -> int:
        """Distinct weights, embeddings and positions included."""
        tables = self.vocab_size * (1 if self.tied_embeddings else 2) + self.num_positions
        return self.layer_weights + tables * self.hidden_size

    def weight_bytes_per_rank(self, shape: ParallelShape) -> float:
        """Bytes on the fullest rank. Layers are divided over tp and pp, experts and all other weights over tp. With
        pp > 1 the embeddings and the head are on different stages. With dp > 1 only routed experts are divided."""
        num_layers = -(-self.num_layers // shape.pp)
        num_dense = max(0, num_layers - self.num_moe_layers)  # the fullest stage has as few dense layers as possible
        layers: float = num_layers * self.attention_weights + num_dense * self.mlp_weights(self.intermediate_size)
        layers += (num_layers - num_dense) * (self.moe_layer_weights - self._moved_weights(shape.dp))
        tables = self.hidden_size * (self.vocab_size + self.num_positions)
        if shape.pp == 1 and not self.tied_embeddings:
            tables += self.hidden_size * self.vocab_size
        return (self.weight_bytes * layers + self.table_bytes * tables) / shape.tp

    def _moved_weights(self, dp: int) -> float:
        """Weights of one layer's routed experts that are on other ranks; 0 without expert parallelism."""
        if self.moe is None or dp == 1:
            return 0.0
        return self.moe.num_experts * (1 - 1 / dp) * self.mlp_weights(self.moe.intermediate_size)

    def activation_bytes_per_rank(self, shape: ParallelShape, batch_tokens: int, sampled: int) -> float:
        """An estimate of a step's peak memory without weights and KV: the residual and the widest layer's input and
        output of `batch_tokens` tokens, 2 bytes a number; two copies of the logits of `sampled` tokens, 4 bytes."""
        width = max(self.intermediate_size, self.num_heads * self.head_dim)
        if self.moe is not None:
            width = max(width, self.moe.top_k * (self.moe.intermediate_size + self.hidden_size))
        inner = (3 if self.gated_mlp else 2) * width / shape.tp
        return (
            batch_tokens * 2.0 * (3 * self.hidden_size + inner) + sampled * self.vocab_size * 8.0 / shape.tp
        ) / shape.dp

    # --- KV ----------------------------------------------------------------------------------------------------------

    @property
    def kv_elements_per_token_and_layer(self) -> int:
        """How many numbers one layer caches for one token."""
        if self.mla is not None:
            return self.mla.kv_lora_rank + self.mla.qk_rope_head_dim
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> float:
        """KV bytes of one token in all layers of the model, not divided over ranks."""
        return self.num_layers * self.kv_elements_per_token_and_layer * self.kv_bytes

    def kv_bytes_per_token_and_rank(self, shape: ParallelShape) -> float:
        """KV bytes on the fullest rank. With more tp ranks than KV heads the heads are replicated; every tp rank has
        the whole latent. With dp > 1 a token's KV is on one rank: the mean over the ranks."""
        layers = -(-self.num_layers // shape.pp)
        split = 1 if self.mla is not None else min(shape.tp, self.num_kv_heads)
        return layers * self.kv_elements_per_token_and_layer * self.kv_bytes / split / shape.dp

    def allows(self, shape: ParallelShape) -> bool:
        """Whether the model can run in this shape: query heads divide over tp, KV heads divide or are replicated
        evenly, every stage has at least one layer, and experts divide over dp."""
        if shape.dp > 1 and (self.moe is None or self.moe.num_experts % shape.dp):
            return False
        if self.num_heads % shape.tp or self.num_layers < shape.pp:
            return False
        heads = self.num_kv_heads
        return self.mla is not None or heads % shape.tp == 0 or shape.tp % heads == 0

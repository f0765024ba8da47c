"""The dimensions of a model that cost and memory follow from, for models of any size, here or not.

`core.model_spec.ModelSpec` says what the engine must compute and refuses what it cannot; a ModelShape is wider
(mixtures of experts, latent attention) and shallower (no RoPE, no epsilon). All counts of weights are exact matrix
sizes; norms and biases, below 0.1 % of any model, are left out.
"""

from dataclasses import dataclass

from tandem.core.model_spec import ModelSpec
from tandem.core.parallel import ParallelShape


@dataclass(frozen=True, slots=True)
class MoeShape:
    """A mixture of experts: `num_experts` routed ones of `intermediate_size`, of which a token visits `top_k`.

    `num_shared` experts see every token. The first `dense_layers` layers have a plain MLP instead.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    num_shared: int = 0
    dense_layers: int = 0


@dataclass(frozen=True, slots=True)
class MlaShape:
    """Multi-head latent attention (DeepSeek-V2): per token one latent of `kv_lora_rank` and a shared RoPE key."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int = 0  # 0: the query projection is one matrix


@dataclass(frozen=True, slots=True)
class ModelShape:
    """`num_positions` is the size of a learned position table, 0 for rotary models. `gated_mlp`: three matrices, not
    two. `weight_bytes` and `kv_bytes` are bytes of one stored number."""

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
    kv_bytes: float = 2.0

    @classmethod
    def from_spec(cls, name: str, spec: ModelSpec, dtype_bytes: int) -> "ModelShape":
        """The shape of a checkpoint that the engine can run."""
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
        """Weights of one plain MLP, or of one expert."""
        return (3 if self.gated_mlp else 2) * self.hidden_size * intermediate_size

    @property
    def num_moe_layers(self) -> int:
        return 0 if self.moe is None else self.num_layers - self.moe.dense_layers

    @property
    def moe_layer_weights(self) -> int:
        """Weights of one mixture: experts and the router; 0 without one."""
        if self.moe is None:
            return 0
        experts = self.moe.num_experts + self.moe.num_shared
        return experts * self.mlp_weights(self.moe.intermediate_size) + self.hidden_size * self.moe.num_experts

    @property
    def layer_weights(self) -> int:
        """Weights of all layers, all experts included."""
        dense = (self.num_layers - self.num_moe_layers) * self.mlp_weights(self.intermediate_size)
        return self.num_layers * self.attention_weights + dense + self.num_moe_layers * self.moe_layer_weights

    @property
    def num_parameters(self) -> int:
        """Distinct weights, embeddings and positions included."""
        tables = self.vocab_size * (1 if self.tied_embeddings else 2) + self.num_positions
        return self.layer_weights + tables * self.hidden_size

    def weight_bytes_per_rank(self, shape: ParallelShape) -> float:
        """Of the fullest rank: layers over tp and pp, experts like all weights over tp; embeddings, or the head, over
        tp on a stage of their own."""
        num_layers = -(-self.num_layers // shape.pp)
        num_dense = max(0, num_layers - self.num_moe_layers)  # a stage of the other layers only is fuller
        layers = num_layers * self.attention_weights + num_dense * self.mlp_weights(self.intermediate_size)
        layers += (num_layers - num_dense) * self.moe_layer_weights
        tables = self.hidden_size * (self.vocab_size + self.num_positions)
        if shape.pp == 1 and not self.tied_embeddings:
            tables += self.hidden_size * self.vocab_size
        return self.weight_bytes * (layers + tables) / shape.tp

    def activation_bytes_per_rank(self, shape: ParallelShape, batch_tokens: int, sampled: int) -> float:
        """An estimate of what one step needs at its peak beside weights and KV: of `batch_tokens` the residual, the
        widest layer's input and output, 2 bytes each; of `sampled` tokens the logits, as 4 bytes and once more."""
        width = max(self.intermediate_size, self.num_heads * self.head_dim)
        if self.moe is not None:
            width = max(width, self.moe.top_k * (self.moe.intermediate_size + self.hidden_size))
        inner = (3 if self.gated_mlp else 2) * width / shape.tp
        return batch_tokens * 2.0 * (3 * self.hidden_size + inner) + sampled * self.vocab_size * 8.0 / shape.tp

    # --- KV ----------------------------------------------------------------------------------------------------------

    @property
    def kv_elements_per_token_and_layer(self) -> int:
        """Numbers that one layer caches of one token."""
        if self.mla is not None:
            return self.mla.kv_lora_rank + self.mla.qk_rope_head_dim
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> float:
        """Over all layers, of one whole copy."""
        return self.num_layers * self.kv_elements_per_token_and_layer * self.kv_bytes

    def kv_bytes_per_token_and_rank(self, shape: ParallelShape) -> float:
        """Of the fullest rank. KV heads beyond their number are replicated; a latent is replicated on every tp rank."""
        layers = -(-self.num_layers // shape.pp)
        split = 1 if self.mla is not None else min(shape.tp, self.num_kv_heads)
        return layers * self.kv_elements_per_token_and_layer * self.kv_bytes / split

    def allows(self, shape: ParallelShape) -> bool:
        """Whether heads divide over tp (KV heads divide, or are replicated evenly) and there is a layer per stage."""
        if self.num_heads % shape.tp or self.num_layers < shape.pp:
            return False
        heads = self.num_kv_heads
        return self.mla is not None or heads % shape.tp == 0 or shape.tp % heads == 0

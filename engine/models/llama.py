"""Llama 2 and 3, Mistral, Qwen2, Qwen2.5 and Qwen3: one decoder whose variants are fields of ModelSpec."""

from dataclasses import dataclass

from torch import Tensor

from tandem.core.model_spec import ModelSpec
from tandem.engine.models.base import StepBatch
from tandem.engine.ops.interface import HeadShape, Ops, PackedLinear
from tandem.engine.rope import cos_sin_table
from tandem.engine.weights import WeightLoader


@dataclass(frozen=True, slots=True)
class _LlamaLayer:
    input_norm: Tensor
    qkv: PackedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: PackedLinear
    mlp_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear
    sliding_window: int | None


class LlamaModel:
    """Implements `Model`."""

    def __init__(
        self,
        spec: ModelSpec,
        ops: Ops,
        embedding: Tensor,
        layers: list[_LlamaLayer],
        norm: Tensor,
        head: PackedLinear,
        cos_sin: Tensor,
    ) -> None:
        self._spec = spec
        self._ops = ops
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._cos_sin = cos_sin
        self._heads = HeadShape(spec.num_heads, spec.num_kv_heads, spec.head_dim)

    def forward(self, batch: StepBatch, pool: Tensor) -> Tensor:
        ops, heads, eps = self._ops, self._heads, self._spec.norm_eps
        scale = heads.head_dim**-0.5
        residual = ops.embedding(batch.token_ids, self._embedding)
        x = ops.rms_norm(residual, self._layers[0].input_norm, eps)
        for index, layer in enumerate(self._layers):
            if index > 0:
                x = ops.add_rms_norm(x, residual, layer.input_norm, eps)
            qkv = ops.linear(x, layer.qkv)
            q = ops.rope_and_cache(
                qkv,
                self._cos_sin,
                batch.positions,
                batch.slots,
                pool[index],
                heads,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=eps,
            )
            x = ops.paged_attention(q, pool[index], batch.meta, heads, scale, layer.sliding_window)
            if batch.rows is not None and index == self._spec.num_layers - 1:
                x, residual = x[batch.rows], residual[batch.rows]
            x = ops.linear(x, layer.output)
            x = ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = ops.linear(ops.gated_linear(x, layer.gate_up), layer.down)
        return ops.add_rms_norm(x, residual, self._norm, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._ops.linear(hidden, self._head).float()


def load_llama(
    spec: ModelSpec, loader: WeightLoader, ops: Ops, max_positions: int, use_long_factors: bool
) -> LlamaModel:
    """Load and pack the weights: Q, K and V as one matrix, gate and up as one. Raises CheckpointError.

    Positions are below `max_positions`; for `use_long_factors` see `engine.rope`.
    """
    hidden = spec.hidden_size
    assert spec.rope is not None, "every model of this file has rotary embeddings"
    cos_sin = cos_sin_table(spec.rope, spec.head_dim, max_positions, use_long_factors)
    embedding, head = loader.take_embeddings(
        "model.embed_tokens.weight", spec.vocab_size, hidden, spec.tie_word_embeddings
    )
    layers = [_load_layer(spec, loader, ops, index) for index in range(spec.num_layers)]
    norm = loader.take("model.norm.weight", hidden)
    return LlamaModel(spec, ops, embedding, layers, norm, ops.pack_linear(head, None), cos_sin.to(embedding.device))


def _load_layer(spec: ModelSpec, loader: WeightLoader, ops: Ops, index: int) -> _LlamaLayer:
    prefix = f"model.layers.{index}"
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def fused(parts: list[str], rows: list[int], columns: int, biased: bool) -> tuple[Tensor, Tensor | None]:
        weight = loader.take_stacked([f"{prefix}.{part}.weight" for part in parts], rows, columns)
        return weight, loader.take_stacked([f"{prefix}.{part}.bias" for part in parts], rows) if biased else None

    attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    return _LlamaLayer(
        input_norm=loader.take(f"{prefix}.input_layernorm.weight", hidden),
        qkv=ops.pack_linear(*fused(attention, [q_size, kv_size, kv_size], hidden, spec.qkv_bias)),
        q_norm=loader.take(f"{prefix}.self_attn.q_norm.weight", spec.head_dim) if spec.qk_norm else None,
        k_norm=loader.take(f"{prefix}.self_attn.k_norm.weight", spec.head_dim) if spec.qk_norm else None,
        output=ops.pack_linear(*fused(["self_attn.o_proj"], [hidden], q_size, spec.output_bias)),
        mlp_norm=loader.take(f"{prefix}.post_attention_layernorm.weight", hidden),
        gate_up=ops.pack_gated(*fused(["mlp.gate_proj", "mlp.up_proj"], [inner, inner], hidden, spec.mlp_bias)),
        down=ops.pack_linear(*fused(["mlp.down_proj"], [hidden], inner, spec.mlp_bias)),
        sliding_window=spec.sliding_windows[index],
    )

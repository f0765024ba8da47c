"""Llama 2 and 3, Mistral, Qwen2, Qwen2.5 and Qwen3: one decoder whose variants are fields of ModelSpec."""

from dataclasses import dataclass

from torch import Tensor

from tandem.core.model_spec import ModelSpec
from tandem.engine.collectives.interface import Collectives
from tandem.engine.models.base import LayerHook, LayerMatrices, StepBatch, embed
from tandem.engine.ops.interface import HeadShape, Ops, PackedLinear
from tandem.engine.rope import cos_sin_table
from tandem.engine.shard import Shard, elements_of
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
        shard: Shard,
        ops: Ops,
        collectives: Collectives,
        embedding: Tensor | None,
        layers: list[_LlamaLayer],
        norm: Tensor | None,
        head: PackedLinear | None,
        cos_sin: Tensor,
    ) -> None:
        """`embedding` is there on the first stage, `norm` and `head` on the last one."""
        self._spec = spec
        self._shard = shard
        self._ops = ops
        self._collectives = collectives
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._cos_sin = cos_sin
        self._heads = HeadShape(len(shard.heads), len(shard.kv_heads), spec.head_dim)

    def forward(
        self, batch: StepBatch, pool: Tensor, received: Tensor | None, layer_computed: LayerHook | None = None
    ) -> Tensor:
        ops, heads, eps, all_reduce = self._ops, self._heads, self._spec.norm_eps, self._collectives.all_reduce
        scale = heads.head_dim**-0.5
        if received is None:
            assert self._embedding is not None
            residual = embed(
                batch.token_ids, self._embedding, self._spec.vocab_size, self._shard, ops, self._collectives
            )
        else:
            residual = received
        last_layer = len(self._layers) - 1 if self._shard.is_last_stage else -1
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
            if batch.rows is not None and index == last_layer:
                x, residual = x[batch.rows], residual[batch.rows]
            x = all_reduce(ops.linear(x, layer.output))
            if layer_computed is not None:  # after the sum, to which the other ranks added once their KV was written
                layer_computed(index + 1)
            x = ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = all_reduce(ops.linear(ops.gated_linear(x, layer.gate_up), layer.down))
        if self._norm is None:
            return residual.add_(x)
        return ops.add_rms_norm(x, residual, self._norm, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        assert self._head is not None
        return self._ops.linear(hidden, self._head).float()


def load_llama(
    spec: ModelSpec,
    shard: Shard,
    loader: WeightLoader,
    ops: Ops,
    collectives: Collectives,
    max_positions: int,
    use_long_factors: bool,
) -> LlamaModel:
    """Load and pack the rank's weights: Q, K and V as one matrix, gate and up as one. Raises CheckpointError.

    Positions are below `max_positions`; for `use_long_factors` see `engine.rope`.
    """
    hidden = spec.hidden_size
    assert spec.rope is not None, "every model of this file has rotary embeddings"
    cos_sin = cos_sin_table(spec.rope, spec.head_dim, max_positions, use_long_factors)
    embedding, head = loader.take_embeddings(
        "model.embed_tokens.weight", spec.vocab_size, hidden, spec.tie_word_embeddings, shard
    )
    layers = []
    for index in range(spec.num_layers):
        prefix = f"model.layers.{index}"
        if index in shard.layers:
            layers.append(_load_layer(spec, shard, loader, ops, prefix, spec.sliding_windows[index]))
        else:
            loader.leave(f"{prefix}.")
    norm = None
    if shard.is_last_stage:
        norm = loader.take("model.norm.weight", hidden)
    else:
        loader.leave("model.norm.")
    packed_head = None if head is None else ops.pack_linear(head, None)
    return LlamaModel(spec, shard, ops, collectives, embedding, layers, norm, packed_head, cos_sin.to(loader.device))


def _load_layer(
    spec: ModelSpec, shard: Shard, loader: WeightLoader, ops: Ops, prefix: str, sliding_window: int | None
) -> _LlamaLayer:
    hidden, inner, head_dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q_size, kv_size = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
    q, kv = elements_of(shard.heads, head_dim), elements_of(shard.kv_heads, head_dim)
    matrices = LayerMatrices(loader, shard, prefix, hidden)
    attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    qkv = matrices.by_outputs(attention, [q_size, kv_size, kv_size], [q, kv, kv], spec.qkv_bias)
    mlp, inners = ["mlp.gate_proj", "mlp.up_proj"], [shard.inner, shard.inner]
    gate_up = matrices.by_outputs(mlp, [inner, inner], inners, spec.mlp_bias)
    return _LlamaLayer(
        input_norm=loader.take(f"{prefix}.input_layernorm.weight", hidden),
        qkv=ops.pack_linear(*qkv),
        q_norm=loader.take(f"{prefix}.self_attn.q_norm.weight", head_dim) if spec.qk_norm else None,
        k_norm=loader.take(f"{prefix}.self_attn.k_norm.weight", head_dim) if spec.qk_norm else None,
        output=ops.pack_linear(*matrices.by_inputs("self_attn.o_proj", q_size, q, spec.output_bias)),
        mlp_norm=loader.take(f"{prefix}.post_attention_layernorm.weight", hidden),
        gate_up=ops.pack_gated(*gate_up),
        down=ops.pack_linear(*matrices.by_inputs("mlp.down_proj", inner, shard.inner, spec.mlp_bias)),
        sliding_window=sliding_window,
    )

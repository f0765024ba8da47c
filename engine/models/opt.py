"""OPT: learned absolute positions, layer norms with biases, a ReLU MLP."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.core.model_spec import OPT_POSITION_OFFSET, ModelSpec
from tandem.engine.collectives.interface import Collectives
from tandem.engine.models.base import LayerHook, LayerMatrices, StepBatch, embed
from tandem.engine.ops.interface import HeadShape, Ops, PackedLinear
from tandem.engine.shard import Shard, elements_of
from tandem.engine.weights import WeightLoader


@dataclass(frozen=True, slots=True)
class _LayerNorm:
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class _OptLayer:
    attention_norm: _LayerNorm
    qkv: PackedLinear
    output: PackedLinear
    mlp_norm: _LayerNorm
    up: PackedLinear
    down: PackedLinear


class OptModel:
    """Implements `Model`."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        ops: Ops,
        collectives: Collectives,
        embedding: Tensor | None,
        position_embedding: Tensor | None,
        layers: list[_OptLayer],
        norm: _LayerNorm | None,
        head: PackedLinear | None,
    ) -> None:
        """The embeddings are there on the first stage, `norm` and `head` on the last one."""
        self._spec = spec
        self._shard = shard
        self._ops = ops
        self._collectives = collectives
        self._embedding = embedding
        self._position_embedding = position_embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._heads = HeadShape(len(shard.heads), len(shard.kv_heads), spec.head_dim)

    def forward(
        self, batch: StepBatch, pool: Tensor, received: Tensor | None, layer_computed: LayerHook | None = None
    ) -> Tensor:
        ops, heads, eps, all_reduce = self._ops, self._heads, self._spec.norm_eps, self._collectives.all_reduce
        scale = heads.head_dim**-0.5
        if received is None:
            assert self._embedding is not None
            assert self._position_embedding is not None
            residual = embed(
                batch.token_ids, self._embedding, self._spec.vocab_size, self._shard, ops, self._collectives
            )
            x = ops.embedding(batch.positions + OPT_POSITION_OFFSET, self._position_embedding)
        else:
            residual, x = received, torch.zeros_like(received)
        last_layer = len(self._layers) - 1 if self._shard.is_last_stage else -1
        for index, layer in enumerate(self._layers):
            x = ops.add_layer_norm(x, residual, layer.attention_norm.weight, layer.attention_norm.bias, eps)
            qkv = ops.linear(x, layer.qkv)
            q = ops.rope_and_cache(qkv, None, batch.positions, batch.slots, pool[index], heads)
            x = ops.paged_attention(q, pool[index], batch.meta, heads, scale, None)
            if batch.rows is not None and index == last_layer:
                x, residual = x[batch.rows], residual[batch.rows]
            x = all_reduce(ops.linear(x, layer.output))
            if layer_computed is not None:  # after the sum, to which the other ranks added once their KV was written
                layer_computed(index + 1)
            x = ops.add_layer_norm(x, residual, layer.mlp_norm.weight, layer.mlp_norm.bias, eps)
            x = all_reduce(ops.linear(ops.linear(x, layer.up).relu_(), layer.down))
        if self._norm is None:
            return residual.add_(x)
        return ops.add_layer_norm(x, residual, self._norm.weight, self._norm.bias, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        assert self._head is not None
        return self._ops.linear(hidden, self._head).float()


def load_opt(spec: ModelSpec, shard: Shard, loader: WeightLoader, ops: Ops, collectives: Collectives) -> OptModel:
    """Load and pack the rank's weights: Q, K and V as one matrix. Raises CheckpointError."""
    hidden = spec.hidden_size
    embedding, head = loader.take_embeddings(
        "model.decoder.embed_tokens.weight", spec.vocab_size, hidden, spec.tie_word_embeddings, shard
    )
    position_embedding = None
    if shard.is_first_stage:
        positions = spec.max_position_embeddings + OPT_POSITION_OFFSET
        position_embedding = loader.take("model.decoder.embed_positions.weight", positions, hidden)
    else:
        loader.leave("model.decoder.embed_positions.")
    layers = []
    for index in range(spec.num_layers):
        prefix = f"model.decoder.layers.{index}"
        if index in shard.layers:
            layers.append(_load_layer(spec, shard, loader, ops, prefix))
        else:
            loader.leave(f"{prefix}.")
    norm = None
    if shard.is_last_stage:
        norm = _load_norm(loader, "model.decoder.final_layer_norm", hidden)
    else:
        loader.leave("model.decoder.final_layer_norm.")
    packed_head = None if head is None else ops.pack_linear(head, None)
    return OptModel(spec, shard, ops, collectives, embedding, position_embedding, layers, norm, packed_head)


def _load_norm(loader: WeightLoader, name: str, hidden: int) -> _LayerNorm:
    return _LayerNorm(loader.take(f"{name}.weight", hidden), loader.take(f"{name}.bias", hidden))


def _load_layer(spec: ModelSpec, shard: Shard, loader: WeightLoader, ops: Ops, prefix: str) -> _OptLayer:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    heads = elements_of(shard.heads, spec.head_dim)
    biased = spec.qkv_bias  # all matrices have biases, or none
    matrices = LayerMatrices(loader, shard, prefix, hidden)
    attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    return _OptLayer(
        attention_norm=_load_norm(loader, f"{prefix}.self_attn_layer_norm", hidden),
        qkv=ops.pack_linear(*matrices.by_outputs(attention, [hidden] * 3, [heads] * 3, biased)),
        output=ops.pack_linear(*matrices.by_inputs("self_attn.out_proj", hidden, heads, biased)),
        mlp_norm=_load_norm(loader, f"{prefix}.final_layer_norm", hidden),
        up=ops.pack_linear(*matrices.by_outputs(["fc1"], [inner], [shard.inner], biased)),
        down=ops.pack_linear(*matrices.by_inputs("fc2", inner, shard.inner, biased)),
    )

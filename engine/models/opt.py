"""OPT: learned absolute positions, layer norms with biases, a ReLU MLP."""

from dataclasses import dataclass

from torch import Tensor

from tandem.core.model_spec import OPT_POSITION_OFFSET, ModelSpec
from tandem.engine.models.base import StepBatch
from tandem.engine.ops.interface import HeadShape, Ops, PackedLinear
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
        ops: Ops,
        embedding: Tensor,
        position_embedding: Tensor,
        layers: list[_OptLayer],
        norm: _LayerNorm,
        head: PackedLinear,
    ) -> None:
        self._spec = spec
        self._ops = ops
        self._embedding = embedding
        self._position_embedding = position_embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._heads = HeadShape(spec.num_heads, spec.num_kv_heads, spec.head_dim)

    def forward(self, batch: StepBatch, pool: Tensor) -> Tensor:
        ops, heads, eps = self._ops, self._heads, self._spec.norm_eps
        scale = heads.head_dim**-0.5
        residual = ops.embedding(batch.token_ids, self._embedding)
        x = ops.embedding(batch.positions + OPT_POSITION_OFFSET, self._position_embedding)
        for index, layer in enumerate(self._layers):
            x = ops.add_layer_norm(x, residual, layer.attention_norm.weight, layer.attention_norm.bias, eps)
            qkv = ops.linear(x, layer.qkv)
            q = ops.rope_and_cache(qkv, None, batch.positions, batch.slots, pool[index], heads)
            x = ops.paged_attention(q, pool[index], batch.meta, heads, scale, None)
            if batch.rows is not None and index == self._spec.num_layers - 1:
                x, residual = x[batch.rows], residual[batch.rows]
            x = ops.linear(x, layer.output)
            x = ops.add_layer_norm(x, residual, layer.mlp_norm.weight, layer.mlp_norm.bias, eps)
            x = ops.linear(ops.linear(x, layer.up).relu_(), layer.down)
        return ops.add_layer_norm(x, residual, self._norm.weight, self._norm.bias, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._ops.linear(hidden, self._head).float()


def load_opt(spec: ModelSpec, loader: WeightLoader, ops: Ops) -> OptModel:
    """Load and pack the weights: Q, K and V as one matrix. Raises CheckpointError."""
    hidden = spec.hidden_size
    positions = spec.max_position_embeddings + OPT_POSITION_OFFSET
    embedding, head = loader.take_embeddings(
        "model.decoder.embed_tokens.weight", spec.vocab_size, hidden, spec.tie_word_embeddings
    )
    position_embedding = loader.take("model.decoder.embed_positions.weight", positions, hidden)
    layers = [_load_layer(spec, loader, ops, index) for index in range(spec.num_layers)]
    norm = _load_norm(loader, "model.decoder.final_layer_norm", hidden)
    return OptModel(spec, ops, embedding, position_embedding, layers, norm, ops.pack_linear(head, None))


def _load_norm(loader: WeightLoader, name: str, hidden: int) -> _LayerNorm:
    return _LayerNorm(loader.take(f"{name}.weight", hidden), loader.take(f"{name}.bias", hidden))


def _load_layer(spec: ModelSpec, loader: WeightLoader, ops: Ops, index: int) -> _OptLayer:
    prefix = f"model.decoder.layers.{index}"
    hidden, inner = spec.hidden_size, spec.intermediate_size

    def linear(parts: list[str], rows: list[int], columns: int) -> PackedLinear:
        weight = loader.take_stacked([f"{prefix}.{part}.weight" for part in parts], rows, columns)
        bias = loader.take_stacked([f"{prefix}.{part}.bias" for part in parts], rows) if spec.qkv_bias else None
        return ops.pack_linear(weight, bias)

    return _OptLayer(
        attention_norm=_load_norm(loader, f"{prefix}.self_attn_layer_norm", hidden),
        qkv=linear(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], [hidden] * 3, hidden),
        output=linear(["self_attn.out_proj"], [hidden], hidden),
        mlp_norm=_load_norm(loader, f"{prefix}.final_layer_norm", hidden),
        up=linear(["fc1"], [inner], hidden),
        down=linear(["fc2"], [hidden], inner),
    )

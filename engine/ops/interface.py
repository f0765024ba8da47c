"""All the arithmetic a model needs. Models are written only in terms of `Ops`, so that how it is computed (plain torch,
own kernels) is chosen in one place.

Shapes are written in brackets. `tokens` is the packed token axis: the new tokens of all sequences of a step, one after
the other, without padding. H are query heads, KVH key/value heads, D the head's width, F the MLP's.

One layer of the KV pool, `kv_layer`, is [2, num_blocks, KVH, block_size, D]; 0 is keys, 1 is values. A slot is
`block * block_size + offset`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Attention heads of one layer. `num_heads` is a multiple of `num_kv_heads`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """Where the tokens of a step belong.

    Sequences are ordered: the first `num_decodes` have exactly one new token each, so rows [0, num_decodes) of the
    packed axis are theirs; the others follow. Tensors are int32 on the device; the `_host` twins hold the same numbers
    so that nobody has to wait for a device to learn them.

    `query_starts` [n + 1]: first packed row of each sequence, and the total.
    `context_lens` [n]: tokens in KV after this step's were written. The new ones are the last of them.
    `block_tables` [n, max_blocks]: the pool's blocks of each sequence, in order; filled up with 0 (a valid block).
    """

    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    query_starts_host: tuple[int, ...]
    context_lens_host: tuple[int, ...]
    num_decodes: int


class PackedLinear:
    """A weight in whatever form the Ops that packed it likes best. Only that Ops can use it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self.in_features = in_features
        self.out_features = out_features


class Ops(Protocol):
    """One way to compute. Inputs may be overwritten only where it says so; results are in `activation_dtype`.

    `activation_dtype` may differ from the dtype of weights and KV: kernels for a CPU without bf16 instructions keep
    activations in float32 though weights and KV are bf16. Norms, rope and softmax are computed in float32 inside.
    """

    @property
    def name(self) -> str: ...

    @property
    def activation_dtype(self) -> torch.dtype: ...

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Prepare weight [out, in] and bias [out] once, at load time. They may be freed afterwards."""
        ...

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """[tokens, in] -> [tokens, out]"""
        ...

    def pack_gated(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Prepare weight [2 F, in] and bias [2 F], gate then up, for `gated_linear`."""
        ...

    def gated_linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """silu(x gate) * (x up): [tokens, in] -> [tokens, F]. `packed` came from `pack_gated`."""
        ...

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """int64 [tokens], [vocab, hidden] -> [tokens, hidden]"""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[tokens, hidden] -> the same shape, a new tensor"""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x, in place; returns the norm of the new residual"""
        ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """[tokens, hidden] -> the same shape, a new tensor"""
        ...

    def add_layer_norm(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """residual += x, in place; returns the norm of the new residual"""
        ...

    def rope_and_cache(
        self,
        qkv: Tensor,
        cos_sin: Tensor | None,
        positions: Tensor,
        slots: Tensor,
        kv_layer: Tensor,
        heads: HeadShape,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """Split, normalise, rotate and store: qkv [tokens, (H + 2 KVH) D] -> q [tokens, H, D].

        `q_norm`, `k_norm` [D]: RMS norm of each head before the rotation (Qwen3). `cos_sin` float32
        [max_positions, D]: cosines of the D/2 angles, then their sines; the rotation pairs element i with i + D/2, as
        Hugging Face does. None: no rotation. Keys and values are written to `kv_layer` at `slots` int64 [tokens].
        `positions` int64 [tokens]. qkv may be overwritten.
        """
        ...

    def paged_attention(
        self,
        q: Tensor,
        kv_layer: Tensor,
        meta: AttentionMeta,
        heads: HeadShape,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Causal attention of the new tokens over their sequence's KV: q [tokens, H, D] -> [tokens, H D].

        With `sliding_window` W a token sees itself and the W - 1 tokens before it.
        """
        ...

    def relu(self, x: Tensor) -> Tensor:
        """May work in place."""
        ...

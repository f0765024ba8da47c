"""The arithmetic of a model. Models are written in terms of `Ops`, whose implementation is chosen in one place.

Shapes are in brackets. `tokens` is the packed token axis: the new tokens of all sequences of a step, one sequence after
the other, without padding. H is the number of query heads, KVH of key/value heads, D the head's width, F the MLP's.

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
    """The n sequences of a step: their rows of the packed axis and their KV.

    The first `num_decodes` sequences have one new token each, in rows [0, num_decodes) of the packed axis; the others
    follow. Tensors are int32 on the device; the `_host` fields hold the same numbers on the host, so that reading them
    does not wait for the device.

    `query_starts` [n + 1]: first packed row of each sequence, and the total.
    `context_lens` [n]: tokens in KV, the step's new tokens included, which are the last.
    `block_tables` [n, max_blocks]: the pool's blocks of each sequence, in order; padded with 0 (a valid block).
    """

    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    query_starts_host: tuple[int, ...]
    context_lens_host: tuple[int, ...]
    num_decodes: int


class PackedLinear:
    """A weight in the form of the `Ops` that packed it. No other `Ops` can use it."""

    __slots__ = ()


class Ops(Protocol):
    """Inputs are overwritten only where a method says so; results are new tensors in the activations' dtype.

    The activations' dtype may differ from that of weights and KV: the native kernels keep activations in float32 with
    weights and KV in bf16. Norms, rope and softmax are computed in float32.
    """

    @property
    def name(self) -> str: ...

    @property
    def activation_dtype(self) -> torch.dtype: ...

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Prepare weight [out, in] and bias [out] at load time. The caller may free both afterwards."""
        ...

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """[tokens, in] -> [tokens, out]"""
        ...

    def pack_gated(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Prepare weight [2 F, in] and bias [2 F], first gate and then up, for `gated_linear`."""
        ...

    def gated_linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """silu(x gate) * (x up): [tokens, in] -> [tokens, F]. `packed` came from `pack_gated`."""
        ...

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """int64 [tokens], [vocab, hidden] -> [tokens, hidden]"""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]"""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x, in place; returns the norm of the new residual, [tokens, hidden]"""
        ...

    def add_layer_norm(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """residual += x, in place; returns the norm of the new residual, [tokens, hidden]"""
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
        Hugging Face does; None means no rotation. `positions`, `slots` int64 [tokens]. Keys and values are written to
        `kv_layer` at `slots`. `qkv` may be overwritten, and the result may share its memory.
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

"""`Ops` in plain torch, for any device: the reference for other implementations, and the fallback."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engine.ops.interface import AttentionMeta, HeadShape, PackedLinear


@dataclass(frozen=True, slots=True)
class TorchLinear(PackedLinear):
    """weight [out, in] and bias [out], unchanged."""

    weight: Tensor
    bias: Tensor | None


class TorchOps:
    """Implements `Ops`. Activations have the dtype of the weights."""

    name = "torch"

    def __init__(self, activation_dtype: torch.dtype) -> None:
        self._activation_dtype = activation_dtype

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return TorchLinear(weight, bias)

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        assert isinstance(packed, TorchLinear), "packed by another Ops"
        return F.linear(x, packed.weight, packed.bias)

    def pack_gated(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return TorchLinear(weight, bias)

    def gated_linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        gate, up = self.linear(x, packed).chunk(2, dim=-1)
        return F.silu(gate) * up

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(token_ids, weight).to(self._activation_dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # As Hugging Face rounds it: to the activation's dtype before the weight is applied.
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
        return weight * normed.to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(residual.add_(x), weight, eps)

    def add_layer_norm(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.layer_norm(residual.add_(x), (x.shape[-1],), weight, bias, eps)

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
        num_tokens = qkv.shape[0]
        q, k, v = torch.split(qkv, [heads.q_size, heads.kv_size, heads.kv_size], dim=-1)
        q = q.reshape(num_tokens, heads.num_heads, heads.head_dim)
        k = k.reshape(num_tokens, heads.num_kv_heads, heads.head_dim)
        v = v.reshape(num_tokens, heads.num_kv_heads, heads.head_dim)
        if q_norm is not None:
            q = self.rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = self.rms_norm(k, k_norm, eps)
        if cos_sin is not None:
            rows = cos_sin[positions].unsqueeze(1)
            q, k = _rotate(q, rows), _rotate(k, rows)
        block_size = kv_layer.shape[3]
        blocks, offsets = slots // block_size, slots % block_size
        kv_layer[0, blocks, :, offsets] = k.to(kv_layer.dtype)
        kv_layer[1, blocks, :, offsets] = v.to(kv_layer.dtype)
        return q

    def paged_attention(
        self,
        q: Tensor,
        kv_layer: Tensor,
        meta: AttentionMeta,
        heads: HeadShape,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        out = torch.empty(q.shape[0], heads.num_heads, heads.head_dim, dtype=q.dtype, device=q.device)
        if meta.num_decodes:
            out[: meta.num_decodes] = _attend_decodes(q, kv_layer, meta, scale, sliding_window)
        for index in range(meta.num_decodes, len(meta.context_lens_host)):
            rows = slice(meta.query_starts_host[index], meta.query_starts_host[index + 1])
            out[rows] = _attend_chunk(
                q[rows], kv_layer, meta.block_tables[index], meta.context_lens_host[index], scale, sliding_window
            )
        return out.view(q.shape[0], heads.q_size)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [tokens, heads, D], cos_sin [tokens, 1, D], in float32 and back."""
    cos, sin = cos_sin.chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _attend_decodes(
    q: Tensor, kv_layer: Tensor, meta: AttentionMeta, scale: float, sliding_window: int | None
) -> Tensor:
    """[num_decodes, H, D] for the sequences with one new token: gathered to the longest context, then masked."""
    n = meta.num_decodes
    block_size = kv_layer.shape[3]
    longest = max(meta.context_lens_host[:n])
    tables = meta.block_tables[:n, : -(-longest // block_size)]
    # [2, n, blocks, KVH, slot, D] -> [2, n, KVH, blocks * slot, D]
    kv = kv_layer[:, tables].transpose(2, 3).flatten(3, 4)
    key_positions = torch.arange(kv.shape[3], device=q.device)
    ends = meta.context_lens[:n].unsqueeze(1)
    visible = key_positions < ends
    if sliding_window is not None:
        visible &= key_positions >= ends - sliding_window
    # A NaN that an earlier sequence left in these blocks would spread through the mask, so clear invisible KV.
    kv = kv.masked_fill(~visible[None, :, None, :, None], 0.0).to(q.dtype)
    out = F.scaled_dot_product_attention(
        q[:n].unsqueeze(2),
        kv[0],
        kv[1],
        attn_mask=visible[:, None, None, :],
        scale=scale,
        enable_gqa=True,
    )
    return out.squeeze(2)


def _attend_chunk(
    q: Tensor, kv_layer: Tensor, table: Tensor, context_len: int, scale: float, sliding_window: int | None
) -> Tensor:
    """q [T, H, D] of one sequence's new tokens -> [T, H, D]. The new tokens are the last T of `context_len`."""
    num_new, block_size = q.shape[0], kv_layer.shape[3]
    start = context_len - num_new
    # Blocks before every query's window are not read.
    first_key = 0 if sliding_window is None else max(0, start - sliding_window + 1)
    first_block = first_key // block_size
    blocks = table[first_block : -(-context_len // block_size)]
    first_key = first_block * block_size
    kv = kv_layer[:, blocks].transpose(1, 2).flatten(2, 3)[:, :, : context_len - first_key].to(q.dtype)
    if start == 0 and sliding_window is None:
        mask, is_causal = None, True
    else:
        queries = torch.arange(start, context_len, device=q.device).unsqueeze(1)
        keys = torch.arange(first_key, context_len, device=q.device)
        mask, is_causal = keys <= queries, False
        if sliding_window is not None:
            mask &= keys > queries - sliding_window
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        kv[0].unsqueeze(0),
        kv[1].unsqueeze(0),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=True,
    )
    return out.squeeze(0).transpose(0, 1)

"""`Ops` in plain torch, for any device: the reference for other implementations, and the fallback."""

from collections.abc import Iterator, Sequence
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
    """Implements `Ops`. Activations have the dtype of the weights.

    A row's result may depend on the batch in its last bits: torch chooses its kernels by shape.

    `attention_bytes` bounds the tensors that attention makes beside its result (at least a block's keys have to fit).
    Sequences for which that is too little are computed in tiles of keys.
    """

    name = "torch"

    def __init__(self, activation_dtype: torch.dtype, attention_bytes: int = 256 << 20) -> None:
        self.activation_dtype = activation_dtype
        self._attention_bytes = attention_bytes

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
        return F.embedding(token_ids, weight).to(self.activation_dtype)

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
        limit = self._attention_bytes
        # Keys and values as they are gathered, or one of them repeated for all query heads.
        key_bytes = max(2 * heads.num_kv_heads, heads.num_heads) * heads.head_dim * q.element_size()
        for group in _group_decodes(meta.context_lens_host[: meta.num_decodes], limit // key_bytes):
            rows = slice(group.start, group.stop) if isinstance(group, range) else torch.tensor(group, device=q.device)
            longest = max(meta.context_lens_host[index] for index in group)
            if longest * key_bytes <= limit:
                out[rows] = _attend_decodes(
                    q[rows], kv_layer, meta.block_tables[rows], meta.context_lens[rows], longest, scale, sliding_window
                )
            else:
                out[rows] = _attend_in_tiles(
                    q[rows], kv_layer, meta.block_tables[group[0]], longest, scale, sliding_window, limit
                )
        for index in range(meta.num_decodes, len(meta.context_lens_host)):
            rows = slice(meta.query_starts_host[index], meta.query_starts_host[index + 1])
            table, context_len = meta.block_tables[index], meta.context_lens_host[index]
            scores_bytes = heads.num_heads * (rows.stop - rows.start) * 4  # of one key; float32 where torch keeps them
            if context_len * max(key_bytes, scores_bytes) <= limit:
                out[rows] = _attend_chunk(q[rows], kv_layer, table, context_len, scale, sliding_window)
            else:
                out[rows] = _attend_in_tiles(q[rows], kv_layer, table, context_len, scale, sliding_window, limit)
        return out.view(q.shape[0], heads.q_size)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [tokens, heads, D], cos_sin [tokens, 1, D], in float32 and back."""
    cos, sin = cos_sin.chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _group_decodes(context_lens: Sequence[int], max_keys: int) -> Iterator[Sequence[int]]:
    """Groups of sequences, each padded to its longest, with at most `max_keys` keys; a longer sequence is alone.

    All of them as a range, if possible, else sequences of about the same length.
    """
    if not context_lens:
        return
    if len(context_lens) * max(context_lens) <= max_keys:
        yield range(len(context_lens))
        return
    group: list[int] = []
    for index in sorted(range(len(context_lens)), key=context_lens.__getitem__):
        if group and (len(group) + 1) * context_lens[index] > max_keys:
            yield group
            group = []
        group.append(index)
    yield group


def _attend_decodes(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    longest: int,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """[n, H, D] for n sequences with one new token each: gathered to the longest context, then masked."""
    block_size = kv_layer.shape[3]
    tables = block_tables[:, : -(-longest // block_size)]
    # [2, n, blocks, KVH, slot, D] -> [2, n, KVH, blocks * slot, D]
    kv = kv_layer[:, tables].transpose(2, 3).flatten(3, 4)[:, :, :, :longest]
    key_positions = torch.arange(longest, device=q.device)
    ends = context_lens.unsqueeze(1)
    visible = key_positions < ends
    if sliding_window is not None:
        visible &= key_positions >= ends - sliding_window
    # A NaN that an earlier sequence left in these blocks would spread through the mask, so clear invisible KV.
    kv = kv.masked_fill(~visible[None, :, None, :, None], 0.0).to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.unsqueeze(2),
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


def _attend_in_tiles(
    q: Tensor,
    kv_layer: Tensor,
    table: Tensor,
    context_len: int,
    scale: float,
    sliding_window: int | None,
    limit_bytes: int,
) -> Tensor:
    """As `_attend_chunk`, in tiles of queries and keys whose results are merged: the online softmax of FlashAttention.

    In float32. No tensor beside the result is larger than `limit_bytes`, unless a block's keys and values are.
    """
    num_new, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_layer.shape[2:4]
    shared_by = num_heads // num_kv_heads
    tile_blocks = max(1, min(2048, limit_bytes // (8 * num_kv_heads * head_dim)) // block_size)
    tile_keys = tile_blocks * block_size
    tile_queries = max(1, limit_bytes // (4 * num_heads * max(tile_keys, head_dim)))
    start = context_len - num_new
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for first in range(0, num_new, tile_queries):
        part = q[first : first + tile_queries]
        num_queries = part.shape[0]
        positions = torch.arange(start + first, start + first + num_queries, device=q.device).unsqueeze(1)
        end = start + first + num_queries
        begin = 0 if sliding_window is None else max(0, start + first - sliding_window + 1)
        # [T, H, D] -> [KVH, H / KVH * T, D]
        queries = (part.float() * scale).view(num_queries, num_kv_heads, shared_by, head_dim)
        queries = queries.permute(1, 2, 0, 3).reshape(num_kv_heads, shared_by * num_queries, head_dim)
        maxima = queries.new_full((*queries.shape[:2], 1), -torch.inf)
        sums, values = torch.zeros_like(maxima), torch.zeros_like(queries)
        for tile in range(begin // tile_keys * tile_keys, end, tile_keys):
            low, high = max(begin, tile), min(end, tile + tile_keys)
            blocks = table[tile // block_size : -(-high // block_size)]
            kv = kv_layer[:, blocks].transpose(1, 2).flatten(2, 3)[:, :, low - tile : high - tile]
            scores = queries @ kv[0].float().transpose(1, 2)
            keys = torch.arange(low, high, device=q.device)
            hidden = keys > positions
            if sliding_window is not None:
                hidden |= keys <= positions - sliding_window
            scores.view(num_kv_heads, shared_by, num_queries, -1).masked_fill_(hidden, -torch.inf)
            top = torch.maximum(maxima, scores.amax(-1, keepdim=True))
            finite = top.clamp(min=torch.finfo(torch.float32).min)  # -inf minus -inf would not be a number
            weights, keep = scores.sub_(finite).exp_(), (maxima - finite).exp()
            maxima, sums = top, sums * keep + weights.sum(-1, keepdim=True)
            values = torch.baddbmm(values * keep, weights, kv[1].float())
        result = (values / sums).view(num_kv_heads, shared_by, num_queries, head_dim)
        out[first : first + num_queries] = result.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return out

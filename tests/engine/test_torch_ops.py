"""Attention in plain torch: bounded memory with equal results."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.engine.ops.interface import AttentionMeta, HeadShape
from tandem.engine.ops.torch_ops import TorchOps

_HEADS, _BLOCK = HeadShape(6, 2, 16), 16


class LargestAllocation(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes; those in `known` existed before."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return result


def _step(lengths: list[tuple[int, int]], dtype: torch.dtype) -> tuple[Tensor, Tensor, AttentionMeta]:
    """Queries, KV and sequences of (new tokens, context); slots that no sequence has hold NaN."""
    torch.manual_seed(0)
    blocks_of = [-(-context // _BLOCK) for _, context in lengths]
    kv = torch.full((2, sum(blocks_of), _HEADS.num_kv_heads, _BLOCK, _HEADS.head_dim), torch.nan)
    order = torch.randperm(sum(blocks_of)).tolist()
    tables, starts = torch.zeros(len(lengths), max(blocks_of), dtype=torch.int32), [0]
    for row, (new, context) in enumerate(lengths):
        blocks = [order.pop() for _ in range(blocks_of[row])]
        tables[row, : len(blocks)] = torch.tensor(blocks)
        for index, block in enumerate(blocks):
            filled = min(_BLOCK, context - index * _BLOCK)
            kv[:, block, :, :filled] = torch.randn(2, _HEADS.num_kv_heads, filled, _HEADS.head_dim)
        starts.append(starts[-1] + new)
    contexts = tuple(context for _, context in lengths)
    meta = AttentionMeta(
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables,
        query_starts_host=tuple(starts),
        context_lens_host=contexts,
        num_decodes=sum(new == 1 for new, _ in lengths),
    )
    return torch.randn(starts[-1], _HEADS.num_heads, _HEADS.head_dim).to(dtype), kv.to(dtype), meta


@pytest.mark.parametrize("window", [None, 1, 30, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_bounded_memory_is_the_same(dtype: torch.dtype, window: int | None) -> None:
    """Decodes of unequal lengths, one of them longer than fits, a prompt, and a chunk of a long prompt."""
    limit = 64 << 10
    q, kv, meta = _step([(1, 3), (1, 1500), (1, 40), (1, 33), (1, 90), (70, 70), (90, 1300)], dtype)
    expected = TorchOps(dtype).paged_attention(q, kv, meta, _HEADS, 0.3, window)
    ops = TorchOps(dtype, attention_bytes=limit)
    with LargestAllocation(q, kv, meta.block_tables) as unbounded:
        TorchOps(dtype).paged_attention(q, kv, meta, _HEADS, 0.3, window)
    with LargestAllocation(q, kv, meta.block_tables) as bounded:
        actual = ops.paged_attention(q, kv, meta, _HEADS, 0.3, window)
    assert bounded.num_bytes <= max(limit, actual.nbytes)
    assert unbounded.num_bytes > 4 * limit
    # In bf16 both are rounded once, and torch rounds the weights before their product with the values.
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_one_long_sequence_does_not_pad_the_others() -> None:
    """63 short sequences beside one of 60,000 tokens: padded they would need a gigabyte."""
    q, kv, meta = _step([(1, 60_000), *[(1, 20)] * 63], torch.float32)
    with LargestAllocation(q, kv, meta.block_tables) as allocated:
        result = TorchOps(torch.float32).paged_attention(q, kv, meta, _HEADS, 0.3, None)
    assert allocated.num_bytes <= 60_032 * 2 * 2 * 16 * 4
    for row in (0, 5):
        alone = AttentionMeta(
            query_starts=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=meta.context_lens[row : row + 1],
            block_tables=meta.block_tables[row : row + 1],
            query_starts_host=(0, 1),
            context_lens_host=meta.context_lens_host[row : row + 1],
            num_decodes=1,
        )
        expected = TorchOps(torch.float32).paged_attention(q[row : row + 1], kv, alone, _HEADS, 0.3, None)
        torch.testing.assert_close(result[row : row + 1], expected, rtol=1e-5, atol=1e-5)

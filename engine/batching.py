"""Slices of sequences -> the packed tensors of one step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tandem.core.kv_layout import KvLayout
from tandem.engine.models.base import StepBatch
from tandem.engine.ops.interface import AttentionMeta
from tandem.engine.step import SequenceSlice

_Integers = np.ndarray[tuple[int, ...], np.dtype[np.integer[Any]]]


def decodes_first(slices: Sequence[SequenceSlice]) -> list[int]:
    """Indices of the slices in packed order: those with one token, then the others, each in the given order."""
    single = [index for index, part in enumerate(slices) if len(part.token_ids) == 1]
    return single + [index for index, part in enumerate(slices) if len(part.token_ids) != 1]


def pack(slices: Sequence[SequenceSlice], layout: KvLayout, vocab_size: int, device: torch.device) -> StepBatch:
    """Pack slices that are already in `decodes_first` order.

    Asserts that blocks and token ids exist: kernels would follow wrong ones to any place in memory.
    """
    block_size = layout.block_size
    lengths = [len(part.token_ids) for part in slices]
    ends = [part.start + length for part, length in zip(slices, lengths, strict=True)]
    tables = np.zeros((len(slices), max(-(-end // block_size) for end in ends)), dtype=np.int32)
    for row, (part, end) in enumerate(zip(slices, ends, strict=True)):
        needed = -(-end // block_size)
        assert len(part.block_table) >= needed, "a slice's block table has no room for its tokens"
        tables[row, :needed] = part.block_table[:needed]
    assert _all_below(tables, layout.num_blocks), "a block that the pool does not have"
    query_starts = np.zeros(len(slices) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_starts[1:])
    owner = np.repeat(np.arange(len(slices)), lengths)
    starts = np.array([part.start for part in slices], dtype=np.int64)
    positions = np.arange(query_starts[-1], dtype=np.int64) - query_starts[owner] + starts[owner]
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    token_ids = np.fromiter((token for part in slices for token in part.token_ids), dtype=np.int64, count=len(owner))
    assert _all_below(token_ids, vocab_size), "a token id that the model does not have"
    meta = AttentionMeta(
        query_starts=_to(query_starts, device),
        context_lens=_to(np.array(ends, dtype=np.int32), device),
        block_tables=_to(tables, device),
        query_starts_host=tuple(query_starts.tolist()),
        context_lens_host=tuple(ends),
        num_decodes=sum(length == 1 for length in lengths),
        max_query_len=max(lengths),
        max_context_len=max(ends),
    )
    wanted = _wanted_rows(slices, meta.query_starts_host)
    return StepBatch(
        token_ids=_to(token_ids, device),
        positions=_to(positions, device),
        slots=_to(slots, device),
        meta=meta,
        rows=None if len(wanted) == len(owner) else _to(np.array(wanted, dtype=np.int64), device),
    )


def _wanted_rows(slices: Sequence[SequenceSlice], query_starts: Sequence[int]) -> list[int]:
    rows: list[int] = []
    for part, end in zip(slices, query_starts[1:], strict=True):
        rows += range(end - num_wanted_rows(part), end)
    return rows


def num_wanted_rows(part: SequenceSlice) -> int:
    """How many of its rows, the last ones, a slice needs hidden states of."""
    if part.prompt_logprobs is not None:
        return len(part.token_ids)
    return 0 if part.sample is None else 1


def _all_below(array: _Integers, limit: int) -> bool:
    return bool(array.min() >= 0 and array.max() < limit)


def _to(array: _Integers, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    # Pinned memory lets the copy to a device run beside the host's next lines.
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

"""Slices of sequences -> the packed tensors of one step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tandem.core.errors import InternalError
from tandem.core.kv_layout import KvLayout
from tandem.engine.models.base import StepBatch
from tandem.engine.ops.interface import AttentionMeta
from tandem.engine.step import SequenceSlice

_Integers = np.ndarray[tuple[int, ...], np.dtype[np.integer[Any]]]


def pack(
    slices: Sequence[SequenceSlice], layout: KvLayout, vocab_size: int, max_model_len: int, device: torch.device
) -> StepBatch:
    """Pack the slices: those with one token first, then the others, each in the given order.

    Raises InternalError for a position, block or token id that does not exist, because kernels would write and read
    wrong memory.
    """
    if not slices:
        raise InternalError("A step has no slices")
    block_size = layout.block_size
    order = sorted(range(len(slices)), key=lambda index: len(slices[index].token_ids) != 1)
    ordered = [slices[index] for index in order]
    lengths = [len(part.token_ids) for part in ordered]
    ends = [part.start + length for part, length in zip(ordered, lengths, strict=True)]
    starts = [part.start for part in ordered]
    if min(lengths) < 1 or min(starts) < 0 or max(ends) > max_model_len:
        raise InternalError(f"A slice is empty or has positions outside of [0, {max_model_len})")
    tables = np.zeros((len(slices), max(-(-end // block_size) for end in ends)), dtype=np.int32)
    for row, (part, end) in enumerate(zip(ordered, ends, strict=True)):
        needed = -(-end // block_size)
        if len(part.block_table) < needed:
            raise InternalError(f"A slice has {len(part.block_table)} blocks, and its {end} tokens need {needed}")
        tables[row, :needed] = part.block_table[:needed]
    _check_below("block", tables, layout.num_blocks)
    query_starts = np.zeros(len(slices) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_starts[1:])
    owner = np.repeat(np.arange(len(slices)), lengths)
    positions = np.arange(query_starts[-1], dtype=np.int64) - query_starts[owner] + np.array(starts)[owner]
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    token_ids = np.fromiter((token for part in ordered for token in part.token_ids), dtype=np.int64, count=len(owner))
    _check_below("token id", token_ids, vocab_size)
    meta = AttentionMeta(
        query_starts=_to(query_starts, device),
        context_lens=_to(np.array(ends, dtype=np.int32), device),
        block_tables=_to(tables, device),
        query_starts_host=tuple(query_starts.tolist()),
        context_lens_host=tuple(ends),
        num_decodes=sum(length == 1 for length in lengths),
    )
    rows = _wanted_rows(slices, order, meta.query_starts_host)
    return StepBatch(
        token_ids=_to(token_ids, device),
        positions=_to(positions, device),
        slots=_to(slots, device),
        meta=meta,
        rows=None if rows == list(range(len(owner))) else _to(np.array(rows, dtype=np.int64), device),
    )


def _wanted_rows(slices: Sequence[SequenceSlice], order: Sequence[int], query_starts: Sequence[int]) -> list[int]:
    """Packed rows, in the order of `slices`. `order[i]` is the slice that is packed as sequence i."""
    ends = dict(zip(order, query_starts[1:], strict=True))
    return [row for index, part in enumerate(slices) for row in range(ends[index] - num_wanted_rows(part), ends[index])]


def num_wanted_rows(part: SequenceSlice) -> int:
    """For how many of its tokens, the last ones, a slice needs hidden states."""
    if part.prompt_logprobs is not None:
        return len(part.token_ids)
    return 0 if part.sample is None else 1


def _check_below(name: str, values: _Integers, limit: int) -> None:
    if values.view(f"u{values.itemsize}").max() >= limit:  # a negative number is a large unsigned one
        raise InternalError(f"A {name} of a step is outside of [0, {limit})")


def _to(array: _Integers, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    # Pinned memory lets the copy to a device run beside the host's next lines.
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

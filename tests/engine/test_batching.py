import pytest
import torch

from tandem.core.errors import InternalError
from tandem.core.kv_layout import KvLayout
from tandem.core.request import SamplingParams
from tandem.engine.batching import pack
from tandem.engine.models.base import StepBatch
from tandem.engine.step import SampleRequest, SequenceSlice

_LAYOUT = KvLayout(
    num_layers=1, num_blocks=10, num_kv_heads=1, block_size=4, head_dim=2, dtype="float32", weights_hash=""
)


def _pack(slices: list[SequenceSlice]) -> StepBatch:
    return pack(slices, _LAYOUT, vocab_size=8, max_model_len=12, device=torch.device("cpu"))


def test_decodes_come_first_and_keep_their_order() -> None:
    slices = [SequenceSlice([index] * length, 0, [index]) for index, length in enumerate((3, 1, 2, 1))]
    batch = _pack(slices)
    assert batch.token_ids.tolist() == [1, 3, 0, 0, 0, 2, 2]
    assert batch.meta.query_starts_host == (0, 1, 2, 5, 7)


def test_tokens_are_packed_without_padding() -> None:
    """A decode at position 6 of blocks (9, 2) and a chunk of positions 2 to 5 of blocks (5, 0)."""
    batch = _pack([SequenceSlice([7], 6, [9, 2, 8]), SequenceSlice([1, 2, 3, 4], 2, (5, 0))])
    assert batch.token_ids.tolist() == [7, 1, 2, 3, 4]
    assert batch.positions.tolist() == [6, 2, 3, 4, 5]
    assert batch.slots.tolist() == [2 * 4 + 2, 5 * 4 + 2, 5 * 4 + 3, 0, 1]
    meta = batch.meta
    assert meta.query_starts.tolist() == list(meta.query_starts_host) == [0, 1, 5]
    assert meta.context_lens.tolist() == list(meta.context_lens_host) == [7, 6]
    assert meta.block_tables.tolist() == [[9, 2], [5, 0]]
    assert meta.num_decodes == 1


def test_only_wanted_rows_are_carried_to_the_end() -> None:
    request = SampleRequest(SamplingParams(), 3, (), 3)
    middle = SequenceSlice([1, 2, 3], 0, [1])
    last = SequenceSlice([1, 2, 3], 0, [2], request)
    scored = SequenceSlice([1, 2, 3], 0, [3], prompt_logprobs=0)
    decode = SequenceSlice([1], 2, [4], request)
    rows = _pack([decode, middle, last, scored]).rows
    assert rows is not None
    assert rows.tolist() == [0, 6, 7, 8, 9]
    rows = _pack([middle]).rows
    assert rows is not None
    assert rows.tolist() == []
    assert _pack([decode, decode, scored]).rows is None
    rows = _pack([last, scored, decode, middle]).rows  # rows are in the order of the slices, not of the batch
    assert rows is not None
    assert rows.tolist() == [3, 4, 5, 6, 0]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (SequenceSlice([1], 4, [3]), "has 1 blocks, and its 5 tokens need 2"),
        (SequenceSlice([1], 0, [10]), "block of a step is outside"),
        (SequenceSlice([1], 0, [-1]), "block of a step is outside"),
        (SequenceSlice([8], 0, [0]), "token id of a step is outside"),
        (SequenceSlice([-1], 0, [0]), "token id of a step is outside"),
        (SequenceSlice([1, 2], 11, [0, 1, 2, 3]), "positions outside"),
        (SequenceSlice([1], -1, [0]), "positions outside"),
        (SequenceSlice([], 3, [0]), "is empty"),
    ],
)
def test_numbers_that_would_lead_kernels_to_wrong_memory_are_refused(part: SequenceSlice, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        _pack([part])

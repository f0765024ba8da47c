import pytest
import torch

from tandem.core.kv_layout import KvLayout
from tandem.core.request import SamplingParams
from tandem.engine.batching import decodes_first, pack
from tandem.engine.step import SampleRequest, SequenceSlice

_LAYOUT = KvLayout(
    num_layers=1, num_blocks=10, num_kv_heads=1, block_size=4, head_dim=2, dtype="float32", weights_hash=""
)
_CPU = torch.device("cpu")


def test_decodes_come_first_and_keep_their_order() -> None:
    slices = [SequenceSlice(range(length), 0, ()) for length in (3, 1, 2, 1)]
    assert decodes_first(slices) == [1, 3, 0, 2]


def test_tokens_are_packed_without_padding() -> None:
    """A decode at position 6 of blocks (9, 2) and a chunk of positions 2 to 5 of blocks (5, 0)."""
    batch = pack([SequenceSlice([7], 6, [9, 2, 8]), SequenceSlice([1, 2, 3, 4], 2, (5, 0))], _LAYOUT, 8, _CPU)
    assert batch.token_ids.tolist() == [7, 1, 2, 3, 4]
    assert batch.positions.tolist() == [6, 2, 3, 4, 5]
    assert batch.slots.tolist() == [2 * 4 + 2, 5 * 4 + 2, 5 * 4 + 3, 0, 1]
    meta = batch.meta
    assert meta.query_starts.tolist() == list(meta.query_starts_host) == [0, 1, 5]
    assert meta.context_lens.tolist() == list(meta.context_lens_host) == [7, 6]
    assert meta.block_tables.tolist() == [[9, 2], [5, 0]]
    assert (meta.num_decodes, meta.max_query_len, meta.max_context_len) == (1, 4, 7)


def test_only_wanted_rows_are_carried_to_the_end() -> None:
    request = SampleRequest(SamplingParams(), 3, (), 3)
    middle = SequenceSlice([1, 2, 3], 0, [1])
    last = SequenceSlice([1, 2, 3], 0, [2], request)
    scored = SequenceSlice([1, 2, 3], 0, [3], prompt_logprobs=0)
    decode = SequenceSlice([1], 2, [4], request)
    rows = pack([decode, middle, last, scored], _LAYOUT, 8, _CPU).rows
    assert rows is not None
    assert rows.tolist() == [0, 6, 7, 8, 9]
    rows = pack([middle], _LAYOUT, 8, _CPU).rows
    assert rows is not None
    assert rows.tolist() == []
    assert pack([decode, decode, scored], _LAYOUT, 8, _CPU).rows is None


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (SequenceSlice([1], 4, [3]), "no room"),
        (SequenceSlice([1], 0, [10]), "a block that the pool does not have"),
        (SequenceSlice([1], 0, [-1]), "a block that the pool does not have"),
        (SequenceSlice([8], 0, [0]), "a token id that the model does not have"),
        (SequenceSlice([-1], 0, [0]), "a token id that the model does not have"),
    ],
)
def test_what_kernels_could_not_survive_is_caught(part: SequenceSlice, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        pack([part], _LAYOUT, 8, _CPU)

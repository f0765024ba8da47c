"""A step as bytes: everything that other ranks compute with comes back, and damage is found."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.errors import InternalError
from tandem.core.request import SamplingParams
from tandem.engine.step import SampleRequest, SequenceSlice
from tandem.engine.step_bytes import decode_step, encode_step

_ids = st.integers(0, 2**31 - 1)
_slices = st.builds(
    SequenceSlice,
    token_ids=st.lists(_ids, max_size=5),
    start=st.integers(0, 2**30),
    block_table=st.lists(_ids, max_size=5),
    sample=st.sampled_from([None, SampleRequest(SamplingParams(), 3, (1, 2, 3), 3)]),
    prompt_logprobs=st.sampled_from([None, 0, 4]),
    next_token_id=st.sampled_from([None, 0, 7]),
)


@given(number=st.integers(0, 2**63), slices=st.lists(_slices, max_size=4))
def test_a_step_comes_back(number: int, slices: list[SequenceSlice]) -> None:
    decoded_number, decoded = decode_step(encode_step(number, slices))
    assert decoded_number == number
    assert [(s.token_ids, s.start, s.block_table) for s in decoded] == [
        (s.token_ids, s.start, s.block_table) for s in slices
    ]
    for got, sent in zip(decoded, slices, strict=True):
        for field in ("sample", "prompt_logprobs", "next_token_id"):
            assert (getattr(got, field) is None) == (getattr(sent, field) is None)


@given(slices=st.lists(_slices, min_size=1, max_size=3), data=st.data())
def test_a_damaged_step_is_refused(slices: list[SequenceSlice], data: st.DataObject) -> None:
    sent = encode_step(1, slices)
    at = data.draw(st.integers(0, len(sent) - 1))
    flipped = bytes([*sent[:at], sent[at] ^ (1 << data.draw(st.integers(0, 7))), *sent[at + 1 :]])
    for damaged in (flipped, sent[:at], sent + b"\0"):
        with pytest.raises(InternalError):
            decode_step(damaged)

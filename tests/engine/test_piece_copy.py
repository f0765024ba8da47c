"""Pieces of memory are copied, whatever their place and length, and nothing else is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.ops.native_library import NativeUnavailableError
from tandem.engine.ops.piece_copy import native_copy_pieces
from tandem.kv_transfer.arrival import CopyPieces

SLOT = 700  # bytes; longer than any piece


@pytest.fixture(scope="module")
def copy() -> CopyPieces:
    try:
        return native_copy_pieces()
    except NativeUnavailableError as error:
        pytest.skip(str(error))


@settings(deadline=None, max_examples=60)
@given(st.permutations(range(8)), st.integers(0, 8), st.integers(0, 600), st.integers(0, 99), st.integers(0, 99))
def test_pieces(
    copy: CopyPieces, places: list[int], count: int, length: int, source_shift: int, target_shift: int
) -> None:
    source = np.random.default_rng(1).integers(0, 256, 8 * SLOT, dtype=np.uint8)
    target = np.zeros_like(source)
    from_offsets = np.arange(count, dtype=np.int64) * SLOT + source_shift
    to_offsets = np.array(places[:count], dtype=np.int64) * SLOT + target_shift
    expected = target.copy()
    for begin, to in zip(from_offsets, to_offsets, strict=True):
        expected[to : to + length] = source[begin : begin + length]
    copy(target.ctypes.data, to_offsets, source.ctypes.data, from_offsets, length)
    assert np.array_equal(target, expected)

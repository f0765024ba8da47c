"""What a JSON body is made of is counted before it is parsed."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.errors import InvalidRequestError
from tandem.router.http_body import _Structure

JSON_VALUES = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('",:[]{}\\ax\n'), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.sampled_from('",:[]{}\\ax'), max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def count_parts(value: Any) -> tuple[int, int, int]:
    """Lists and objects, keys, separators."""
    if not isinstance(value, list | dict):
        return 0, 0, 0
    is_dict = isinstance(value, dict)
    inner = [count_parts(item) for item in (value.values() if is_dict else value)]
    counts = (1, len(value) if is_dict else 0, max(0, len(value) - 1))
    return tuple(map(sum, zip(counts, *inner, strict=True)))  # type: ignore[return-value]


@given(JSON_VALUES, st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_structure_is_counted_as_it_is_wherever_the_pieces_end(value: Any, sizes: list[int]) -> None:
    structure, rest = _Structure(10_000), json.dumps(value).encode()
    while rest:
        for size in sizes:
            structure.read(rest[:size])
            rest = rest[size:]
    counted = (structure._num_containers, structure._num_keys, structure._num_items)
    assert counted == count_parts(value)


def test_text_may_have_any_number_of_commas() -> None:
    structure = _Structure(100)
    structure.read(b'"' + b',[{:\\",' * 10_000 + b'"')
    with pytest.raises(InvalidRequestError, match="more than 100 items"):
        structure.read(b"," * 101)

"""Protobuf messages that are wrong in one to three places, and bytes that are no messages."""

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

_TEXTS = ["", "x", "tiny", "\0", "é𝄞\u202e", "x" * 300, "y" * 3000, "{{ x }}", "%s", "127.0.0.1:1", "[::1", "0:0:0"]
_INTEGERS = [0, 1, 2, 5, 20, 21, 255, 700, 768, 1 << 16]
_FLOATS = [0.0, -0.0, 1.0, 0.5, 2.0, -1.0, 1e-300, 5e-324, 1e30, 1e308, float("inf"), float("-inf"), float("nan")]


def _integers(bits: int, *, signed: bool) -> list[int]:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return [*_INTEGERS, low, high, high - 1, *([-1, -2] if signed else [])]


_VALUES: dict[int, list[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: _integers(32, signed=True),
    FieldDescriptor.CPPTYPE_INT64: _integers(64, signed=True),
    FieldDescriptor.CPPTYPE_UINT32: _integers(32, signed=False),
    FieldDescriptor.CPPTYPE_UINT64: _integers(64, signed=False),
    FieldDescriptor.CPPTYPE_DOUBLE: _FLOATS,
    FieldDescriptor.CPPTYPE_FLOAT: _FLOATS,
    FieldDescriptor.CPPTYPE_BOOL: [False, True],
    FieldDescriptor.CPPTYPE_ENUM: [0, 1, 2, 3, 4, 99, -1],
}


def _value(draw: st.DrawFn, field: FieldDescriptor) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        text = draw(st.sampled_from(_TEXTS) | st.text(max_size=20))
        return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    return draw(st.sampled_from(_VALUES[field.cpp_type]))


def _damage(draw: st.DrawFn, message: Message, depth: int = 0) -> None:
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = draw(st.sampled_from(fields))
    is_message = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
    if draw(st.integers(0, 7)) == 0:
        message.ClearField(field.name)
    elif field.is_repeated:
        items = getattr(message, field.name)
        match draw(st.integers(0, 3)):
            case 0 if len(items) > 0:
                del items[draw(st.integers(0, len(items) - 1))]
            case 1 if len(items) > 0:
                items.extend(list(items) * draw(st.sampled_from([1, 30, 300])))
            case _ if is_message:
                _damage(draw, items[-1] if len(items) > 0 and draw(st.booleans()) else items.add(), depth + 1)
            case _:
                items.extend(_value(draw, field) for _ in range(draw(st.integers(1, 3))))
    elif is_message:
        inner = getattr(message, field.name)
        inner.SetInParent()
        _damage(draw, inner, depth + 1)
    else:
        setattr(message, field.name, _value(draw, field))


@st.composite
def damaged(draw: st.DrawFn, *goods: Message) -> bytes:
    """One of the good messages, with one to three fields changed; in one of six, with bytes changed as well."""
    good = draw(st.sampled_from(goods))
    message = type(good)()
    message.CopyFrom(good)
    for _ in range(draw(st.integers(1, 3))):
        _damage(draw, message)
    raw = message.SerializeToString()
    return draw(_damaged_bytes(raw)) if draw(st.integers(0, 5)) == 0 else raw


@st.composite
def _damaged_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    position = draw(st.integers(0, len(raw)))
    match draw(st.integers(0, 5)):
        case 0:
            return raw[:position]
        case 1:
            return raw[:position] + draw(st.binary(min_size=1, max_size=8)) + raw[position:]
        case 2:
            return raw[:position] + draw(st.binary(min_size=1, max_size=4)) + raw[position + 4 :]
        case 3:
            return raw + raw[position:]
        case 4:
            return b"\x1b" * draw(st.sampled_from([1, 99, 100_000]))  # groups in groups
        case _:
            return draw(st.binary(max_size=64))

"""Conversion of values whose fields have the names, and most of them the types, of a message's fields."""

from dataclasses import Field
from typing import Any, ClassVar, Protocol, TypeVar

from google.protobuf.message import Message


class DataclassInstance(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


AnyMessage = TypeVar("AnyMessage", bound=Message)
Value = TypeVar("Value", bound=DataclassInstance)


def to_message(message_type: type[AnyMessage], value: DataclassInstance, /, **converted: Any) -> AnyMessage:
    """`converted` has the fields of other types. Raises ValueError for a field that the message does not have."""
    names = [name for name in value.__dataclass_fields__ if name not in converted]
    return message_type(**{name: getattr(value, name) for name in names}, **converted)


def from_message(value_type: type[Value], message: Message, /, **converted: Any) -> Value:
    """Repeated fields become tuples; `converted` has the fields of other types. Raises AttributeError for a field that
    the message does not have."""
    names = [name for name in value_type.__dataclass_fields__ if name not in converted]
    return value_type(**{name: _plain(getattr(message, name)) for name in names}, **converted)


def _plain(value: Any) -> Any:
    return value if isinstance(value, _SINGLE) else tuple(value)


_SINGLE = (int, float, str, bytes)

"""Conversion of values whose fields have the names and types of a message's fields, one for one."""

from dataclasses import Field, fields
from typing import Any, ClassVar, Protocol, TypeVar

from google.protobuf.message import Message


class DataclassInstance(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


AnyMessage = TypeVar("AnyMessage", bound=Message)
Value = TypeVar("Value", bound=DataclassInstance)


def to_message(message_type: type[AnyMessage], value: DataclassInstance) -> AnyMessage:
    """Raises ValueError for a field that the message does not have."""
    return message_type(**{field.name: getattr(value, field.name) for field in fields(value)})


def from_message(value_type: type[Value], message: Message) -> Value:
    """Repeated fields become tuples. Raises AttributeError for a field that the message does not have."""
    return value_type(**{field.name: _plain(getattr(message, field.name)) for field in fields(value_type)})


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bytes) else tuple(value)

"""Typed reading of a checkpoint's config.json. The error for a wrong value names the field."""

import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

from tandem.core.errors import CheckpointError

_DTYPES = ("float32", "bfloat16", "float16")
# Far more than any field of a real model: kernels count in 32 bits, and absurd numbers must not allocate memory.
_LARGEST_COUNT = 2**31 - 1
_SHOWN_CHARACTERS = 80


class CheckpointFields:
    """Reads one JSON object of a config.json. All methods raise CheckpointError for a value of the wrong kind.

    A field that is absent or null takes the default; without a default it is required.
    """

    def __init__(self, values: Mapping[str, Any], inside: str = "") -> None:
        self._values = values
        self._where = f"config.json: {inside}, " if inside else "config.json: "

    def has(self, key: str) -> bool:
        return key in self._values

    def raw(self, key: str, default: Any) -> Any:
        return self._values.get(key, default)

    def count(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = _LARGEST_COUNT) -> int:
        """A whole number of at least `minimum` and at most `maximum`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise CheckpointError(f"{self._where}'{key}' must be a whole number of at least {minimum}, {_not(value)}")
        if value > maximum:
            raise CheckpointError(f"{self._where}'{key}' must be at most {maximum}, {_not(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._get(key, default)
        if not _is_positive(value):
            raise CheckpointError(f"{self._where}'{key}' must be a positive number, {_not(value)}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self._values.get(key) is None else self.number(key)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive numbers; empty when absent."""
        value = self._values.get(key) or []
        if not isinstance(value, list) or not all(_is_positive(item) for item in value):
            raise CheckpointError(f"{self._where}'{key}' must be a list of positive numbers")
        return tuple(float(item) for item in value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self._where}'{key}' must be true or false, {_not(value)}")
        return value

    def require(self, key: str, default: Any, supported: tuple[Any, ...]) -> None:
        """Raise for a value that is not among `supported`."""
        value = self._get(key, default)
        if value not in supported:
            raise CheckpointError(f"{self._where}'{key}' {shown(value)} is not supported, only {supported[0]!r}")

    def dtype(self) -> str:
        """The checkpoint's dtype, from `dtype` or `torch_dtype`; float32 without either."""
        value = self._values.get("dtype") or self._values.get("torch_dtype") or "float32"
        if value not in _DTYPES:
            raise CheckpointError(f"{self._where}the dtype {shown(value)} is not supported, only {', '.join(_DTYPES)}")
        return str(value)

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self._where}'{key}' is missing")
        return value


def shown(value: Any) -> str:
    """The value as text for a one-line message: quoted, and cut if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def _not(value: Any) -> str:
    return f"not {shown(value)}"


def _is_positive(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number above 0 that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max

"""The error sentence of an invalid setting, and the setting's path in the file."""

import difflib
import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError, WrapSerializer
from pydantic_core import ErrorDetails

from tandem.core.frozen_model import WrongSetting

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "path_type": "the path of a file or folder",
    "tuple_type": "a list, each item after '- '",
}
_Loc = tuple[int | str, ...]


def mistakes_of(error: ValidationError, data: object) -> list[ErrorDetails]:
    """The mistakes in `data`, without those that follow from others: a list with invalid items is not too short."""
    details = error.errors()
    for detail in details:
        detail["loc"] = _as_written(detail["loc"], data)
    locations = [detail["loc"] for detail in details]

    def follows(detail: ErrorDetails) -> bool:
        loc = detail["loc"]
        return detail["type"] == "too_short" and any(other[: len(loc)] == loc != other for other in locations)

    return [detail for detail in details if not follows(detail)]


def _as_written(loc: _Loc, data: object) -> _Loc:
    """`loc` without the index of a section that stands for a list of one section (`core.instance_section.Kinds`)."""
    written: list[int | str] = []
    for part in loc:
        if isinstance(part, int) and not (isinstance(data, (list, tuple)) or (isinstance(data, dict) and part in data)):
            continue
        written.append(part)
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, (list, tuple)) and isinstance(part, int):
            data = data[part] if part < len(data) else None
    return tuple(written)


def location(detail: ErrorDetails) -> _Loc:
    """Path of the setting at fault. A check of a complete section names it with a `core.frozen_model.WrongSetting`."""
    cause = detail.get("ctx", {}).get("error")
    return detail["loc"] + (cause.setting if isinstance(cause, WrongSetting) else ())


def describe(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """The sentence for one mistake that pydantic found while it read `model`, with the path of the setting."""
    loc, kind, value = location(detail), detail["type"], detail["input"]
    context = detail.get("ctx", {})
    name = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        return f"{name} is not a setting; {_suggest(model, loc)}"
    if kind == "missing":
        return f"{name} is missing; add it"
    if kind == "invalid_key":
        return f"{loc[-1]!r} cannot be the name of a setting; names are text"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"{name} {_not_a_section(model, loc, value)}"
    if kind == "literal_error":
        expected = context["expected"].replace("'", "")
        return f"{name} must be {'one of ' if ' or ' in expected else ''}{expected}, not {_shown(value)}"
    if kind == "too_short":
        return f"{name} must have at least {context['min_length']} item"
    if kind == "greater_than":
        return f"{name} must be more than {context['gt']:g}, not {_shown(value)}"
    if kind == "greater_than_equal":
        return f"{name} must be at least {context['ge']:g}, not {_shown(value)}"
    if kind == "less_than_equal":
        return f"{name} must be at most {context['le']}, not {_shown(value)}"
    if kind == "value_error":
        return f"{name}: {context['error']}" if name else str(context["error"])
    if kind == "string_type":
        hint = "give it a value or remove the line" if value is None else "put it in quotes"
        return f"{name} must be text, not {_shown(value)}; {hint}"
    if kind in _EXPECTED:
        size = " or a size like 512MiB" if kind == "int_parsing" and "memory" in str(loc[-1]) else ""
        return f"{name} must be {_EXPECTED[kind]}{size}, not {_shown(value)}"
    message = detail["msg"]
    return f"{name}: {message[:1].lower()}{message[1:]}"


def _shown(value: object) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _not_a_section(model: type[BaseModel], loc: _Loc, value: object) -> str:
    settings = _settings_at(model, loc)
    section = f"{loc[-1]}." if loc and isinstance(loc[-1], str) else ""
    hint = f", e.g. {section}{settings[0]}" if settings and loc else ""
    return f"is a section, not {_shown(value)}; give it settings of its own{hint}, or remove it"


def _suggest(model: type[BaseModel], loc: _Loc) -> str:
    wrong, siblings = str(loc[-1]), _settings_at(model, loc[:-1])
    elsewhere = [path for path in _all_paths(model) if path.rpartition(".")[2] == wrong]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    if close := difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.6):
        return f"did you mean {close[0]}?"
    return f"the settings here are {', '.join(siblings)}"


def _settings_at(model: type[BaseModel], loc: _Loc) -> list[str]:
    section: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, int):  # an item of a list: `_section_type` has looked into the list
            continue
        field = section.model_fields.get(part) if section else None
        section = _section_type(field.annotation) if field else None
    return list(section.model_fields) if section else []


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation allows, by itself, as an option, or as the items of a list."""
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        sections = (_section_type(option) for option in get_args(annotation))
        return next((section for section in sections if section is not None), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _all_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if section := _section_type(field.annotation):
            # One section may stand for a list of one: `core.instance_section.Kinds`.
            may_be_one = any(isinstance(item, WrapSerializer) for item in field.metadata)
            items = "[]" if get_origin(field.annotation) is tuple and not may_be_one else ""
            yield from _all_paths(section, f"{prefix}{name}{items}.")

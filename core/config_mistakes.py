"""One sentence for each way in which a setting can be wrong."""

import difflib
import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "path_type": "the path of a folder",
    "tuple_type": "a list",
}


def describe(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """The sentence for one mistake that pydantic found while it read `model`, with the path of the setting."""
    loc, kind, value = detail["loc"], detail["type"], detail["input"]
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
        return f"{name} must be one of {context['expected'].replace(chr(39), '')}, not {_shown(value)}"
    if kind == "greater_than":
        return f"{name} must be more than {context['gt']:g}, not {_shown(value)}"
    if kind == "greater_than_equal":
        return f"{name} must be at least {context['ge']}, not {_shown(value)}"
    if kind == "less_than_equal":
        return f"{name} must be at most {context['le']}, not {_shown(value)}"
    if kind == "value_error":
        return f"{name}: {context['error']}"
    if kind == "string_type":
        hint = "give it a value or remove the line" if value is None else "put it in quotes"
        return f"{name} must be text, not {_shown(value)}; {hint}"
    if expected := _EXPECTED.get(kind):
        size = " or a size like 512MiB" if kind == "int_parsing" and "memory" in str(loc[-1]) else ""
        return f"{name} must be {expected}{size}, not {_shown(value)}"
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


def _not_a_section(model: type[BaseModel], loc: tuple[int | str, ...], value: object) -> str:
    settings = _settings_at(model, loc)
    hint = f", e.g. {loc[-1]}.{settings[0]}" if settings and loc else ""
    return f"is a section, not {_shown(value)}; give it settings of its own{hint}, or remove it"


def _suggest(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    wrong, siblings = str(loc[-1]), _settings_at(model, loc[:-1])
    if close := difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.6):
        return f"did you mean {close[0]}?"
    elsewhere = [path for path in _all_paths(model) if path.rpartition(".")[2] == wrong]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"the settings here are {', '.join(siblings)}"


def _settings_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] | None = model
    for part in loc:
        field = section.model_fields.get(str(part)) if section else None
        section = _section_type(field.annotation) if field else None
    return list(section.model_fields) if section else []


def _section_type(annotation: Any) -> type[BaseModel] | None:
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _all_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if section := _section_type(field.annotation):
            yield from _all_paths(section, f"{prefix}{name}.")

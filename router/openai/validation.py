"""Reads a body into its fields, and says which field is wrong.

Null, false and empty values count as not given, except in a required field. An unknown field is refused, so that a
misspelt name is noticed; unknown fields of a message are ignored. A documented field that this server does not support
is refused, unless its value asks for nothing. A field without effect on the response is ignored.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tandem.core.errors import InvalidRequestError
from tandem.router.limits import clipped

BodyT = TypeVar("BodyT", bound=BaseModel)

IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls",
    }
)  # fmt: skip

# Fields that are not supported, each with the values that ask for nothing. Null and empty values always do; false does,
# unless true does.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions", "logit_bias", "suffix", "audio", "prediction", "reasoning_effort"), ()),
    **dict.fromkeys(("verbosity", "web_search_options", "moderation", "best_of", "min_tokens", "priority"), ()),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("skip_special_tokens", "add_special_tokens", "add_generation_prompt"), (True,)),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_MAX_OPTIONS = 64
_REQUIRED = frozenset({"model", "messages", "prompt"})


def validate(kind: type[BodyT], body: Any) -> BodyT:
    """Raises InvalidRequestError that names the first wrong field."""
    if not isinstance(body, dict):
        raise InvalidRequestError(f"The body must be a JSON object, but it is {_type_name(body)}.")
    try:
        return kind.model_validate(_given_fields(body, kind.model_fields))
    except ValidationError as error:
        message, param = _sentence(error.errors(include_url=False)[0])
        raise InvalidRequestError(message, param=param) from error


def _given_fields(body: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The fields to validate. Raises InvalidRequestError for a field that is not supported, or not known."""
    given = {}
    for name, value in body.items():
        if name in UNSUPPORTED:
            _check_unsupported(name, value, body)
        elif name in _REQUIRED or not (_is_empty(value) or name in IGNORED):
            if name not in known:
                raise InvalidRequestError(
                    f"Unrecognized request argument supplied: {clipped(name)}", param=clipped(name)
                )
            given[name] = value
    for name in ("stream_options", "tandem"):
        if isinstance(options := given.get(name), dict):
            if len(options) > _MAX_OPTIONS:
                raise InvalidRequestError(f"'{name}' has more than {_MAX_OPTIONS} fields.", param=name)
            given[name] = {key: value for key, value in options.items() if not _is_empty(value)}
    return given


def _is_empty(value: Any) -> bool:
    return not value and (value is False or not isinstance(value, int | float))


def _check_unsupported(name: str, value: Any, body: dict[str, Any]) -> None:
    harmless = UNSUPPORTED[name]
    if value is False and True in harmless:
        raise InvalidRequestError(f"This server does not support '{name}' being false.", param=name)
    if value and value not in harmless and not (name == "best_of" and value == (body.get("n") or 1)):
        raise InvalidRequestError(f"'{name}' is not supported by this server.", param=name)


def _type_name(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), "another value")


def _sentence(error: ErrorDetails) -> tuple[str, str]:
    """The message about one wrong field, and the field's name, such as messages[0].content."""
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    name = clipped(name)
    match error["type"]:
        case "missing":
            return f"Missing required parameter: '{name}'.", name
        case "extra_forbidden":
            return f"Unrecognized request argument supplied: {name}", name
        case "literal_error":
            return f"Invalid value for '{name}': it must be one of {error['ctx']['expected']}.", name
        case kind if kind.endswith(("_type", "_parsing")) or kind == "int_from_float":
            is_object = error["type"] in ("model_type", "dict_type")
            expected = "an object" if is_object else error["msg"].removeprefix("Input should be ")
            return f"Invalid type for '{name}': expected {expected}, but got {_type_name(error['input'])}.", name
        case _:
            return f"Invalid '{name}': {error['msg']}.", name

"""The JSON bodies of /v1/chat/completions and /v1/completions, as OpenAI documents them, with Tandem's extensions.

Types are strict: "1" is not 1, 1.0 is not 1. A field nobody knows is refused, so that a misspelt one is noticed. What
OpenAI documents but this server cannot do is refused by name unless it is given its harmless value; what has no effect
on the answer is accepted and ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from tandem.core.completion import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from tandem.core.errors import InvalidRequestError
from tandem.core.request import SamplingParams
from tandem.router.limits import clipped

B = TypeVar("B", bound="CommonBody")

_IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls",
    }
)  # fmt: skip

# Documented, not supported: the values that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "moderation": (None,),
    "best_of": (None,),
}

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions


def _one_or_many(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise PydanticCustomError("string_or_list", "it must be a string or a list of strings")


def _join_parts(value: Any) -> Any:
    """A message's content: text, or a list of parts that are all text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "it must be a string or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            raise PydanticCustomError(
                "content", 'only parts of the form {{"type": "text", "text": "..."}} are supported{kind}',
                {"kind": f", not '{clipped(kind)}'" if isinstance(kind, str) and kind != "text" else ""},
            )  # fmt: skip
        texts.append(part["text"])
    return "\n".join(texts)


def _ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _prompts(value: Any) -> list[Prompt]:
    if isinstance(value, str):
        return [TextPrompt(value)]
    if _ids(value):
        return [TokenPrompt(tuple(value))]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return [TextPrompt(item) for item in value]
        if all(_ids(item) for item in value):
            return [TokenPrompt(tuple(item)) for item in value]
    raise PydanticCustomError(
        "prompt", "it must be a string, a list of strings, a list of token ids, or a list of lists of token ids"
    )


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())


class _Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]
    name: str | None = None
    refusal: None = None


class _StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _TandemOptions(_Body):
    timeline: bool = False


class CommonBody(_Body):
    """What both endpoints have. A field given as null counts as not given."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: Annotated[list[str], BeforeValidator(_one_or_many)] = Field(default_factory=list)
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    # Tandem's own, named as other open servers name them
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    cache_salt: str | None = None
    tandem: _TandemOptions | None = None

    @property
    def wants_timeline(self) -> bool:
        return self.tandem is not None and self.tandem.timeline

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """Seed and max_tokens travel beside it. A top_p of 0 leaves one token, a top_k of -1 leaves all."""
        top_k, top_p = self.top_k or 0, 1.0 if self.top_p is None else self.top_p
        if top_k == -1:
            top_k = 0
        if top_p == 0.0:
            top_k, top_p = 1, 1.0
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )


class ChatBody(CommonBody):
    messages: list[_Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def prompt(self) -> ChatPrompt:
        """`developer` is the newer name of `system`, which is the one that chat templates know."""
        return ChatPrompt(
            tuple(ChatMessage("system" if m.role == "developer" else m.role, m.content) for m in self.messages)
        )

    @property
    def answer_tokens(self) -> int | None:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequestError(
                "Give 'max_tokens' or 'max_completion_tokens', not both.", param="max_completion_tokens"
            )
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives beside each token; None for no log-probabilities at all."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(CommonBody):
    prompt: Annotated[list[Prompt], BeforeValidator(_prompts)]
    echo: bool | None = None
    logprobs: int | None = None


def _check_unsupported(body: dict[str, Any]) -> None:
    """Refuse what cannot be done; take out what asks for nothing."""
    if body.get("best_of") is not None and body["best_of"] == (body.get("n") or 1):
        del body["best_of"]
    for name in _UNSUPPORTED.keys() & body.keys():
        if body.pop(name) not in _UNSUPPORTED[name]:
            raise InvalidRequestError(f"'{name}' is not supported by this server.", param=name)
    for name in _IGNORED & body.keys():
        del body[name]


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
    """What to say about one wrong field, and its name, such as messages[0].content."""
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
            wanted = error["msg"].removeprefix("Input should be ")
            return f"Invalid type for '{name}': expected {wanted}, but got {_type_name(error['input'])}.", name
        case _:
            return f"Invalid '{name}': {error['msg']}.", name


def parse_chat(body: Any) -> ChatBody:
    """Raises InvalidRequestError that names the first wrong field."""
    return _parse(ChatBody, body)


def parse_completion(body: Any) -> CompletionBody:
    """Raises InvalidRequestError that names the first wrong field."""
    return _parse(CompletionBody, body)


def _parse(kind: type[B], body: Any) -> B:
    if not isinstance(body, dict):
        raise InvalidRequestError(f"The body must be a JSON object, but it is {_type_name(body)}.")
    _check_unsupported(body)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        message, param = _sentence(error.errors(include_url=False)[0])
        raise InvalidRequestError(message, param=param) from error

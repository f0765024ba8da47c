"""Bodies of /v1/chat/completions and /v1/completions, as OpenAI documents them, with Tandem's extensions.

Types are strict: "1" is not 1, 1.0 is not 1. Null, false and empty values count as not given, except in a required
field. An unknown field is refused, so that a misspelt name is noticed; unknown fields of a message are ignored. A
documented field that this server does not support is refused, unless its value asks for nothing. A field without effect
on the response is ignored.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from tandem.core.completion import (
    ChatMessage,
    ChatPrompt,
    CompletionRequest,
    Prompt,
    SamplingDefaults,
    TextPrompt,
    TokenPrompt,
)
from tandem.core.errors import InvalidRequestError
from tandem.core.request import SamplingParams
from tandem.core.request_trace import RequestTrace
from tandem.core.slo import UNSPECIFIED_SLO, RequestedSlo
from tandem.router.limits import MAX_CHOICES, MAX_MESSAGES, MAX_STOP_STRINGS, MAX_STOP_TOKENS, clipped
from tandem.router.openai.responses import ChatWriter, CompletionWriter, ResponseOptions
from tandem.router.tokenizer import TextTokenizer

B = TypeVar("B", bound="_CommonBody")
Number = TypeVar("Number", int, float)

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions

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
_MAX_STRINGS = 1024  # with empty ones, which have no effect
_REQUIRED = frozenset({"model", "messages", "prompt"})
_UNSUPPORTED_IN_MESSAGE = ("tool_calls", "function_call", "audio")


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Facts of a request outside its body. `created_s` is on the wall clock, the other times on the router's clock.

    `echoed_id` goes into the x-request-id header of the response: the client's own id, or else `request_id`. `client`
    and `tenant` come from the API key or, without keys, from the connection and a header; `slo` comes from headers.
    """

    request_id: str
    echoed_id: str
    received_s: float
    deadline_s: float
    created_s: int
    wants_timeline: bool
    wants_explanation: bool = False
    client: str = ""
    tenant: str = ""
    slo: RequestedSlo = UNSPECIFIED_SLO
    trace: RequestTrace | None = None


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A body as a request for the text side, with the writer of its response."""

    request: CompletionRequest
    writer: ChatWriter | CompletionWriter
    is_stream: bool


def parse_chat(
    body: Any, context: RequestContext, tokenizer: TextTokenizer, defaults: SamplingDefaults
) -> ParsedRequest:
    """Parse a body of /v1/chat/completions. Raises InvalidRequestError that names the first wrong field."""
    fields = _validate(_ChatBody, body)
    max_tokens = defaults.max_tokens if fields.limit is None else fields.limit
    request = fields.request(context, defaults, (fields.chat_prompt,), max_tokens, fields.num_logprobs)
    options = fields.response_options(context, with_logprobs=fields.num_logprobs is not None)
    return ParsedRequest(request, ChatWriter(request, tokenizer, options), fields.stream)


def parse_completion(
    body: Any, context: RequestContext, tokenizer: TextTokenizer, defaults: SamplingDefaults
) -> ParsedRequest:
    """Parse a body of /v1/completions. Raises InvalidRequestError that names the first wrong field."""
    fields = _validate(_CompletionBody, body)
    echo = fields.echo
    max_tokens = _DEFAULT_COMPLETION_TOKENS if fields.limit is None else fields.limit
    hides_output = max_tokens == 0
    if hides_output:
        if not echo:
            raise InvalidRequestError("'max_tokens' may only be 0 together with 'echo'.", param="max_tokens")
        max_tokens = 1  # a worker draws at least one token
    prompt_logprobs = fields.logprobs if echo else None
    request = fields.request(
        context, defaults, tuple(fields.prompt), max_tokens, fields.logprobs, prompt_logprobs, echo=echo
    )
    options = fields.response_options(context, with_logprobs=fields.logprobs is not None)
    writer = CompletionWriter(request, tokenizer, options, echo=echo, hides_output=hides_output)
    return ParsedRequest(request, writer, fields.stream)


class _StrictBody(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=()
    )


def _one_or_many(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if isinstance(strings, list) and len(strings) > _MAX_STRINGS:
        raise PydanticCustomError("too_long", "it must have at most {limit} strings", {"limit": MAX_STOP_STRINGS})
    if isinstance(strings, list) and all(isinstance(string, str) for string in strings):
        return tuple(string for string in strings if string)
    raise PydanticCustomError("string_or_list", "it must be a string or a list of strings")


def _join_parts(value: Any) -> str:
    """Content of a message: a string, or a list of text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "it must be a string or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            raise PydanticCustomError(
                "content", 'only parts of the form {"type": "text", "text": "..."} are supported{kind}',
                {"kind": f", not '{clipped(kind)}'" if isinstance(kind, str) and kind != "text" else ""},
            )  # fmt: skip
        texts.append(part["text"])
    return "\n".join(texts)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}


def _at_most(limit: int) -> BeforeValidator:
    """Refuses a longer list before it looks at the items."""

    def check(value: Any) -> Any:
        if isinstance(value, list) and len(value) > limit:
            raise PydanticCustomError(
                "too_long",
                "it must have at most {limit} items, but it has {count}",
                {"limit": limit, "count": len(value)},
            )
        return value

    return BeforeValidator(check)


def _prompts(value: Any) -> list[Prompt]:
    if isinstance(value, str):
        return [TextPrompt(value)]
    if _are_ids(value):
        return [TokenPrompt(tuple(value))]
    if isinstance(value, list) and value:
        if len(value) > MAX_CHOICES:
            raise PydanticCustomError("prompt", "prompts times n must be between 1 and {limit}", {"limit": MAX_CHOICES})
        if all(isinstance(item, str) for item in value):
            return [TextPrompt(item) for item in value]
        if all(_are_ids(item) for item in value):
            return [TokenPrompt(tuple(item)) for item in value]
    raise PydanticCustomError(
        "prompt", "it must be a string, a list of strings, a list of token ids, or a list of lists of token ids"
    )


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]

    @model_validator(mode="before")
    @classmethod
    def _check_parts(cls, message: Any) -> Any:
        """A response of this API, sent back as an assistant message, may have null in place of any part."""
        if not isinstance(message, dict):
            return message
        for name in _UNSUPPORTED_IN_MESSAGE:
            if message.get(name):
                raise PydanticCustomError("unsupported", "'{name}' is not supported by this server", {"name": name})
        if message.get("role") == "assistant" and message.get("content") is None:
            return message | {"content": ""}
        return message


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value


class _StreamOptions(_StrictBody):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class _TandemOptions(_StrictBody):
    timeline: bool = False
    slo: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def requested_slo(self) -> RequestedSlo:
        return RequestedSlo(self.slo, self.ttft_s, self.tpot_s)


class _CommonBody(_StrictBody):
    """Fields of both endpoints."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] = ()
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    # Tandem's own, named as other open servers name them
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[int], _at_most(MAX_STOP_TOKENS)] = []
    cache_salt: str = ""
    tandem: _TandemOptions = _TandemOptions()

    @property
    def limit(self) -> int | None:
        """The largest number of output tokens; None if none is given."""
        if self.max_completion_tokens is None:
            return self.max_tokens
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise InvalidRequestError(
                "Give 'max_tokens' or 'max_completion_tokens', not both with different values.",
                param="max_completion_tokens",
            )
        return self.max_completion_tokens

    def request(
        self,
        context: RequestContext,
        defaults: SamplingDefaults,
        prompts: tuple[Prompt, ...],
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        *,
        echo: bool = False,
    ) -> CompletionRequest:
        return CompletionRequest(
            request_id=context.request_id,
            model=self.model,
            prompts=prompts,
            received_s=context.received_s,
            sampling=self._sampling(defaults.sampling, logprobs, prompt_logprobs),
            seed=self.seed,
            max_tokens=max_tokens,
            stop=self.stop,
            n=self.n,
            echo=echo,
            cache_salt=self.cache_salt,
            deadline_s=context.deadline_s,
            client=context.client,
            tenant=context.tenant,
            slo=self._requested_slo(context.slo),
            trace=context.trace,
        )

    def _requested_slo(self, in_headers: RequestedSlo) -> RequestedSlo:
        in_body = self.tandem.requested_slo
        if UNSPECIFIED_SLO not in (in_body, in_headers):
            raise InvalidRequestError("Give the SLO in the headers or in 'tandem', not in both.", param="tandem")
        return in_headers if in_body == UNSPECIFIED_SLO else in_body

    def _sampling(self, default: SamplingParams, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """Without seed and max_tokens. A top_p of 0 leaves one token, a top_k of -1 leaves all."""
        top_p = _given(self.top_p, default.top_p)
        top_k = _given(self.top_k, default.top_k)
        is_greedy = top_p == 0.0
        return SamplingParams(
            temperature=_given(self.temperature, default.temperature),
            top_p=1.0 if is_greedy else top_p,
            top_k=1 if is_greedy else 0 if top_k == -1 else top_k,
            min_p=_given(self.min_p, default.min_p),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=_given(self.repetition_penalty, default.repetition_penalty),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
        )

    def response_options(self, context: RequestContext, *, with_logprobs: bool) -> ResponseOptions:
        with_timelines = context.wants_timeline or self.tandem.timeline
        usage_chunk = self.stream_options.include_usage or with_timelines
        return ResponseOptions(
            created_s=context.created_s,
            with_logprobs=with_logprobs,
            with_timelines=with_timelines,
            usage_chunk=usage_chunk,
            usage_in_chunks=usage_chunk and self.stream_options.continuous_usage_stats,
        )


class _ChatBody(_CommonBody):
    messages: Annotated[list[_Message], _at_most(MAX_MESSAGES)]
    logprobs: bool = False
    top_logprobs: int | None = None

    @property
    def chat_prompt(self) -> ChatPrompt:
        """`developer` is the newer name of `system`, which is the one that chat templates know."""
        return ChatPrompt(
            tuple(ChatMessage("system" if m.role == "developer" else m.role, m.content) for m in self.messages)
        )

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives beside each token; None for no log-probabilities at all."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class _CompletionBody(_CommonBody):
    prompt: Annotated[list[Prompt], BeforeValidator(_prompts)]
    echo: bool = False
    logprobs: int | None = None


def _validate(kind: type[B], body: Any) -> B:
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
            expected = error["msg"].removeprefix("Input should be ")
            return f"Invalid type for '{name}': expected {expected}, but got {_type_name(error['input'])}.", name
        case _:
            return f"Invalid '{name}': {error['msg']}.", name

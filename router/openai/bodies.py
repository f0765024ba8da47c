"""Fields of the bodies of /v1/chat/completions and /v1/completions, as OpenAI documents them, with Tandem's extensions.

Types are strict: "1" is not 1, 1.0 is not 1. `validation.validate` reads a body into one of these classes.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

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
from tandem.core.sampling_ranges import MAX_LOGPROBS, check_range
from tandem.core.slo import UNSPECIFIED_SLO, RequestedSlo
from tandem.router.limits import MAX_CHOICES, MAX_MESSAGES, MAX_STOP_STRINGS, MAX_STOP_TOKENS, clipped
from tandem.router.openai.responses import ResponseOptions
from tandem.router.request_context import RequestContext

Number = TypeVar("Number", int, float)

_MAX_STRINGS = 1024  # with empty ones, which have no effect
_UNSUPPORTED_IN_MESSAGE = ("tool_calls", "function_call", "audio")


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


class ChatBody(_CommonBody):
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
        if self.top_logprobs is not None:
            check_range("top_logprobs", self.top_logprobs, 0, MAX_LOGPROBS)
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(_CommonBody):
    prompt: Annotated[list[Prompt], BeforeValidator(_prompts)]
    echo: bool = False
    logprobs: int | None = None

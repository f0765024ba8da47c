"""Requests and responses in text: the interface between the two APIs (gRPC, OpenAI HTTP) and the text side.

An API turns a message into a `CompletionRequest` and each `TextDelta` into a message. `router/text_service.py`
tokenizes, gets tokens from a `TokenGenerator` and turns them into text.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from tandem.core.request import FinishReason, SampledToken, SamplingParams, TokenLogprob
from tandem.core.request_trace import RequestTrace
from tandem.core.slo import UNSPECIFIED_SLO, RequestedSlo
from tandem.core.timeline import Timeline


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to continue. It gets the special tokens (beginning of sequence) that the tokenizer adds."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, to be rendered with the checkpoint's own chat template."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, used unchanged."""

    token_ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Values for parameters that a request does not set. Without `max_tokens` the context length is the only limit."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One API call: `n` choices for each prompt, prompt by prompt.

    `seed` and `max_tokens` replace those of `sampling`, where None is not possible. Without a seed each prompt gets a
    random one; without `max_tokens` the context length is the only limit. `received_s` and `deadline_s` are on the
    router's monotonic clock. With `echo` the response begins with the prompt; if a prompt of token ids ends inside of a
    character, the deltas begin with that character. Limits apply to each `client`, which is an API key or the address
    that the request came from; empty: the limits do not distinguish clients. The queue is fair between tenants; an
    empty `tenant` means the client. `trace` is None if the call is not traced.
    """

    request_id: str
    model: str
    prompts: tuple[Prompt, ...]
    received_s: float
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    echo: bool = False
    cache_salt: str = ""
    deadline_s: float = float("inf")
    client: str = ""
    tenant: str = ""
    slo: RequestedSlo = UNSPECIFIED_SLO
    trace: RequestTrace | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of one choice. `num_output_tokens` counts all tokens sampled for the choice, a stop token included."""

    reason: FinishReason
    timeline: Timeline
    num_output_tokens: int


class TextDelta(NamedTuple):
    """New text and tokens of one choice. Text may come later than its tokens: a character may be incomplete, or a stop
    string may have begun.

    Only the last delta of a choice has a `finish`. A sampled stop token is in `stop_token`, since it is not part of
    the text. `prompt_logprobs` come with the first delta, if the request asks for them.
    A NamedTuple, since each token makes one: a frozen dataclass takes twice as long.
    """

    choice: int
    text: str
    tokens: tuple[SampledToken, ...] = ()
    stop_token: SampledToken | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A served model; `max_model_len` is None while no pair of workers is ready."""

    name: str
    max_model_len: int | None


class OpenCompletion(Protocol):
    """A running `CompletionRequest`. Leaving the context ends what still runs, on every worker.

    Iterating gives the deltas of all choices in order of arrival, and raises a TandemError if one choice fails.
    `prompt_token_ids` has one entry per prompt.
    """

    @property
    def prompt_token_ids(self) -> tuple[tuple[int, ...], ...]: ...

    def explanation(self) -> str:
        """The explanation of the first choice: see `core.generation.Generation`."""
        ...

    def __aiter__(self) -> AsyncIterator[TextDelta]: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class CompletionService(Protocol):
    """Serves text-level requests. The APIs make them with `defaults`."""

    @property
    def defaults(self) -> SamplingDefaults: ...

    async def open(self, request: CompletionRequest) -> OpenCompletion:
        """Validate, tokenize, start. Raises InvalidRequestError, ContextLengthError, ModelNotFoundError, and what
        `TokenGenerator.start` raises."""
        ...

    def models(self) -> tuple[ServedModel, ...]: ...

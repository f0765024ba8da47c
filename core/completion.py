"""A request in text, and what comes back: the seam between the two APIs (gRPC, OpenAI HTTP) and the text side.

The APIs turn messages into a `CompletionRequest` and `Delta`s into messages; what lies between is
`router/completion.py`, which tokenizes, asks a `TokenGenerator` for tokens and turns them into text again.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from tandem.core.request import FinishReason, SampledToken, SamplingParams, TokenLogprob
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
    """Token ids, taken as they are."""

    token_ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One API call: `n` choices for each prompt, prompt by prompt.

    `seed` and `max_tokens` replace those of `sampling`, which do not know "not given": without a seed every choice
    draws one, without `max_tokens` an answer may grow as long as the context holds. `received_s` and `deadline_s` are
    on the router's monotonic clock.
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
    cache_salt: str = ""
    deadline_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class Finish:
    """How one choice ended. `num_output_tokens` counts every token drawn for it, a stop token included."""

    reason: FinishReason
    timeline: Timeline
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one choice. Text may lag behind its tokens: a character is not whole, a stop string may begin.

    The last delta of a choice, and no other, has a `finish`. A drawn stop token is in `stop_token`, since it is no
    part of the text. `prompt_logprobs` come once, with the first delta, where they were asked for.
    """

    choice: int
    text: str
    tokens: tuple[SampledToken, ...] = ()
    stop_token: SampledToken | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model; `max_model_len` is None while no worker is there."""

    name: str
    max_model_len: int | None


class Completion(Protocol):
    """A running `CompletionRequest`. Leaving the context closes whatever still runs, on every worker.

    Iterating gives the deltas of all choices as they come, and raises a TandemError if one of them fails.
    `prompt_token_ids` has one entry per prompt.
    """

    @property
    def prompt_token_ids(self) -> tuple[tuple[int, ...], ...]: ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class CompletionService(Protocol):
    """Serves text-level requests."""

    async def open(self, request: CompletionRequest) -> Completion:
        """Validate, tokenize, begin. Raises InvalidRequestError, ContextLengthError, ModelNotFoundError, and what
        `TokenGenerator.start` raises."""
        ...

    def models(self) -> tuple[ModelInfo, ...]: ...

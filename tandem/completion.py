"""Values of the client: options of a request, messages of a stream, a complete answer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from tandem.core.errors import UnavailableError
from tandem.core.request import FinishReason, TokenLogprob
from tandem.core.timeline import Timeline


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `Client.generate` and `Client.stream`. Give exactly one of the three prompts.

    Defaults are the router's: what the checkpoint's generation_config.json says, else temperature 1, no limits, and as
    many tokens as the model's context holds; a random seed.
    `tandem.core.request.SamplingParams` says what each setting means.
    """

    prompt: str
    messages: Sequence[Mapping[str, str]]  # {"role": "user", "content": "..."}, rendered by the model's chat template
    token_ids: Sequence[int]
    model: str  # needed only where a router serves several
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    logprobs: int  # alternatives beside each token; 0: the token alone
    prompt_logprobs: int
    stop: str | Sequence[str]  # the answer ends before the first of them that appears
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    request_id: str  # a request with the id of a running one is refused
    cache_salt: str  # requests share cached prefixes only with equal salts
    slo: str  # an SLO class of the router; without it, and without targets: class default, if there is one
    ttft_s: float  # targets of the request's own, instead of a class: time to first token,
    tpot_s: float  # and time per output token after the first
    tenant: str  # waiting is fair between tenants; default: the client's address
    timeout_s: float  # deadline of the complete answer, for the router too


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; `cached_tokens` of the prompt were found in a prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """One message of a stream. Only the last one has `finish_reason`, `usage` and `timeline`.

    The first one has `prompt_logprobs`, if requested; the first prompt token has no log-probability.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timeline: Timeline | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A complete answer. `logprobs` is empty unless requested, else it has one for each of `token_ids`."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timeline: Timeline
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """`max_model_len` bounds prompt plus answer, in tokens."""

    id: str
    max_model_len: int


def join_deltas(deltas: Iterable[Delta]) -> Completion:
    """The answer of a complete stream. Raises UnavailableError if the stream ended without its last message."""
    collected = list(deltas)
    last = collected[-1] if collected else None
    if last is None or last.finish_reason is None or last.usage is None or last.timeline is None:
        raise UnavailableError("the stream ended before the answer was complete")
    return Completion(
        request_id=last.request_id,
        text="".join(delta.text for delta in collected),
        token_ids=tuple(token_id for delta in collected for token_id in delta.token_ids),
        finish_reason=last.finish_reason,
        usage=last.usage,
        timeline=last.timeline,
        logprobs=tuple(logprob for delta in collected for logprob in delta.logprobs),
        prompt_logprobs=next((delta.prompt_logprobs for delta in collected if delta.prompt_logprobs is not None), None),
    )

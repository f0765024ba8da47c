"""Requests in token ids, their sampling parameters, sampled tokens and reasons to finish."""

from dataclasses import dataclass, field
from enum import Enum

from tandem.core.request_slo import NO_SLO, RequestSlo
from tandem.core.request_trace import RequestTrace


class FinishReason(Enum):
    """Why generation ended without an error."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    CANCELLED = "cancelled"  # by the client, which may also have disconnected


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is sampled from the logits.

    `temperature` 0 means greedy. `top_k` 0 and `top_p` 1.0 mean no limit. Penalties follow the OpenAI and Hugging Face
    definitions: presence and frequency count generated tokens only, repetition counts prompt and generated tokens.
    `logprobs` is the number of alternatives to report beside each token (0: only the token itself, None: nothing).
    `prompt_logprobs` is the same for prompt tokens.
    A sampled token of `stop_token_ids` ends generation; it is reported but is not part of the text.
    The noise depends on `seed` and the token's position alone: a request gets the same tokens on every instance, if
    the kernels compute a row the same way in every batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_tokens: int = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token, and of the likeliest alternatives, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One sampled token. `logprob` is None unless the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One completion to generate, in token ids; text stays in the router.

    `token_ids` holds the prompt and `num_output_tokens` tokens that earlier attempts generated. A request thus
    continues on another instance without a lost, repeated or changed token.
    `cache_salt` separates tenants in the prefix cache: only requests with equal salts share blocks.
    `deadline_s` is on the receiving process's monotonic clock.
    `epoch` counts attempts; messages of an older attempt are dropped.
    `slo` holds the targets that count for it now: none, once it is best effort. On an instance only their values are
    known, not the class's other settings. `trace` is None if the request is not traced.
    """

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_output_tokens: int = 0
    cache_salt: str = ""
    deadline_s: float = float("inf")
    epoch: int = 0
    slo: RequestSlo = NO_SLO
    trace: RequestTrace | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids) - self.num_output_tokens

    @property
    def max_total_tokens(self) -> int:
        """Tokens of the prompt, plus the most that may be generated."""
        return self.num_prompt_tokens + self.sampling.max_tokens

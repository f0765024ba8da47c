"""What a request asks for, and how it may end. Shared words of every process."""

from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    """Why generation ended without an error."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    CANCELLED = "cancelled"  # the client asked for it, or went away


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn from the logits.

    `temperature` 0 means greedy. `top_k` 0 and `top_p` 1.0 mean no limit. Penalties follow the OpenAI and Hugging Face
    definitions: presence and frequency count generated tokens only, repetition counts prompt and generated tokens.
    `logprobs` is the number of alternatives to report beside each token (0: only the token itself, None: none at all).
    `prompt_logprobs` asks the same of each prompt token.
    `stop_token_ids` end generation when drawn; the drawn token is then reported but is not part of the text.
    `seed` and the token's position alone determine the noise, so a request draws the same tokens wherever it runs.
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
    """One drawn token. `logprob` is None unless the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One completion to generate, in token ids; text stays in the router.

    `token_ids` holds the prompt followed by `num_output_tokens` tokens that an earlier attempt already generated, so
    that a request can continue on another worker with nothing lost, repeated or changed.
    `cache_salt` separates tenants in the prefix cache: only requests with equal salts share blocks.
    `deadline_s` is on the receiving process's monotonic clock.
    `epoch` counts attempts; whatever belongs to an older attempt is dropped.
    """

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_output_tokens: int = 0
    cache_salt: str = ""
    deadline_s: float = float("inf")
    epoch: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids) - self.num_output_tokens

    @property
    def max_total_tokens(self) -> int:
        """Prompt plus every token it may generate."""
        return self.num_prompt_tokens + self.sampling.max_tokens

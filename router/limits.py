"""Limits of a request, for both APIs. Errors name fields of the request."""

import math

from tandem.core.completion import ChatPrompt, CompletionRequest, Prompt, TokenPrompt
from tandem.core.errors import ContextLengthError, InvalidRequestError
from tandem.core.request import SamplingParams

MAX_CHOICES_PER_PROMPT = 16
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 256
MAX_LOGPROBS = 20
MAX_MESSAGES = 4096
MAX_ID_CHARS = 256
MAX_REPEATED_CHARS = 200

_INT32_MAX = (1 << 31) - 1


def clipped(text: str) -> str:
    """Text of a client, short enough for an error message and for gRPC's trailers."""
    return text if len(text) <= MAX_REPEATED_CHARS else f"{text[:MAX_REPEATED_CHARS]}..."


def _check_range(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    """Also refuses NaN, which is in no range."""
    if low <= value <= high and not (above_low and value == low):
        return
    lower = f"above {low:g}" if above_low else f"at least {low:g}"
    upper = "" if math.isinf(high) else f" and at most {high:g}"
    raise InvalidRequestError(f"Invalid '{name}': it must be {lower}{upper}, but it is {value}.", param=name)


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    _check_range("temperature", sampling.temperature, 0.0, 2.0)
    _check_range("top_p", sampling.top_p, 0.0, 1.0, above_low=True)
    _check_range("top_k", sampling.top_k, 0, _INT32_MAX)
    _check_range("min_p", sampling.min_p, 0.0, 1.0)
    _check_range("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _check_range("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    _check_range("repetition_penalty", sampling.repetition_penalty, 0.0, 100.0, above_low=True)
    for name, count in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if count is not None:
            _check_range(name, count, 0, min(MAX_LOGPROBS, vocab_size))
    _check_range("stop_token_ids", len(sampling.stop_token_ids), 0, MAX_STOP_TOKENS)
    _check_token_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)


def _check_token_ids(name: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        unknown = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequestError(
            f"Invalid '{name}': token id {unknown} is not in the model's vocabulary of {vocab_size} tokens.", param=name
        )


def _check_prompt(prompt: Prompt, vocab_size: int) -> None:
    match prompt:
        case TokenPrompt(token_ids):
            _check_token_ids("prompt", token_ids, vocab_size)
        case ChatPrompt(messages):
            if not messages:
                raise InvalidRequestError("'messages' must hold at least one message.", param="messages")
            _check_range("messages", len(messages), 1, MAX_MESSAGES)


def check_request(request: CompletionRequest, vocab_size: int) -> None:
    """Check everything that needs no tokens. Raises InvalidRequestError that names the field."""
    _check_range("n", request.n, 1, MAX_CHOICES_PER_PROMPT)
    if not 1 <= len(request.prompts) * request.n <= MAX_CHOICES:
        raise InvalidRequestError(
            f"Invalid 'prompt': prompts times n must be between 1 and {MAX_CHOICES}.", param="prompt"
        )
    if request.max_tokens is not None:
        _check_range("max_tokens", request.max_tokens, 1, _INT32_MAX)
    if request.seed is not None:
        _check_range("seed", request.seed, -(1 << 63), (1 << 63) - 1)
    if len(request.stop) > MAX_STOP_STRINGS or not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in request.stop):
        raise InvalidRequestError(
            f"Invalid 'stop': at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters.", param="stop"
        )
    for name, value in (("cache_salt", request.cache_salt), ("request_id", request.request_id)):
        if len(value) > MAX_ID_CHARS:
            raise InvalidRequestError(f"Invalid '{name}': at most {MAX_ID_CHARS} characters.", param=name)
    _check_sampling(request.sampling, vocab_size)
    for prompt in request.prompts:
        _check_prompt(prompt, vocab_size)


def output_limit(num_prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> int:
    """The largest number of output tokens: `max_tokens`, or as many as fit into the context.

    Raises ContextLengthError with both numbers if prompt and `max_tokens` (at least one token) do not fit, and
    InvalidRequestError if the prompt is empty.
    """
    if num_prompt_tokens == 0:
        raise InvalidRequestError("The prompt is empty: it has no tokens to continue.", param="prompt")
    free_tokens = max_model_len - num_prompt_tokens
    if free_tokens < 1:
        raise ContextLengthError(
            f"The prompt has {num_prompt_tokens} tokens, but at most {max_model_len - 1} fit: the maximum context "
            f"length is {max_model_len} tokens, prompt and output together.",
            param="prompt",
        )
    if max_tokens is None:
        return free_tokens
    if max_tokens > free_tokens:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens, but you requested "
            f"{num_prompt_tokens + max_tokens} ({num_prompt_tokens} in the prompt, {max_tokens} for the output). "
            "Shorten the prompt or lower max_tokens.",
            param="max_tokens",
        )
    return max_tokens

"""Limits of a request, for both APIs. Errors name fields of the request."""

from collections.abc import Sequence

from tandem.core.completion import ChatPrompt, CompletionRequest, Prompt, TokenPrompt
from tandem.core.errors import ContextLengthError, InvalidRequestError
from tandem.core.request import SamplingParams
from tandem.core.sampling_ranges import INT32_MAX, check_range, check_sampling

MAX_CHOICES_PER_PROMPT = 16
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 256
MAX_MESSAGES = 4096
MAX_ID_CHARS = 256
MAX_REPEATED_CHARS = 200


def clipped(text: str) -> str:
    """Text of a client, short enough for an error message and for gRPC's trailers."""
    return text if len(text) <= MAX_REPEATED_CHARS else f"{text[:MAX_REPEATED_CHARS]}..."


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    check_sampling(sampling)
    for name, count in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if count is not None:
            check_range(name, count, 0, vocab_size)
    check_range("stop_token_ids", len(sampling.stop_token_ids), 0, MAX_STOP_TOKENS)
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
            check_range("messages", len(messages), 1, MAX_MESSAGES)


def check_request(request: CompletionRequest, vocab_size: int) -> None:
    """Check everything that needs no tokens. Raises InvalidRequestError that names the field."""
    check_range("n", request.n, 1, MAX_CHOICES_PER_PROMPT)
    if not 1 <= len(request.prompts) * request.n <= MAX_CHOICES:
        raise InvalidRequestError(
            f"Invalid 'prompt': prompts times n must be between 1 and {MAX_CHOICES}.", param="prompt"
        )
    if request.max_tokens is not None:
        check_range("max_tokens", request.max_tokens, 1, INT32_MAX)
    if request.seed is not None:
        check_range("seed", request.seed, -(1 << 63), (1 << 63) - 1)
    if len(request.stop) > MAX_STOP_STRINGS or not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in request.stop):
        raise InvalidRequestError(
            f"Invalid 'stop': at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters.", param="stop"
        )
    for name, value in (
        ("cache_salt", request.cache_salt),
        ("request_id", request.request_id),
        ("tenant", request.tenant),
    ):
        if len(value) > MAX_ID_CHARS:
            raise InvalidRequestError(f"Invalid '{name}': at most {MAX_ID_CHARS} characters.", param=name)
    _check_sampling(request.sampling, vocab_size)
    for prompt in request.prompts:
        _check_prompt(prompt, vocab_size)


def logprobs_limit(
    sampling: SamplingParams, n: int, prompt_lengths: Sequence[int], max_tokens: int | None, max_logprobs: int
) -> int | None:
    """The most output tokens of a choice whose log-probabilities fit into the response; None: there is no such limit.

    `prompt_lengths` are in tokens. Each token counts with its alternatives, in each choice. Raises InvalidRequestError
    if `max_tokens` are too many.
    """
    per_token, per_prompt_token = (
        0 if count is None else 1 + count for count in (sampling.logprobs, sampling.prompt_logprobs)
    )
    scored = n * per_prompt_token * sum(prompt_lengths)
    per_output_token = n * len(prompt_lengths) * per_token
    wanted = scored + per_output_token * (max_tokens or 1)
    if wanted > max_logprobs:
        raise InvalidRequestError(
            f"The response may have {wanted} log-probabilities, but at most {max_logprobs} are allowed, counting each "
            "token of each choice with its alternatives. Lower logprobs, max_tokens, n, or the length of the prompts.",
            param="logprobs",
        )
    return (max_logprobs - scored) // per_output_token if per_output_token else None


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

"""What a body asks for, made ready to run: the request in Tandem's words and the writer of its answer."""

from dataclasses import dataclass
from typing import Any

from tandem.core.completion import CompletionRequest, Prompt
from tandem.core.errors import InvalidRequestError
from tandem.router.openai.bodies import DEFAULT_COMPLETION_TOKENS, CommonBody, parse_chat, parse_completion
from tandem.router.openai.chat import ChatWriter
from tandem.router.openai.completions import CompletionWriter
from tandem.router.tokenizer import TextTokenizer

Writer = ChatWriter | CompletionWriter


@dataclass(frozen=True, slots=True)
class Arrival:
    """What is known of a request beside its body. Times are on the router's clock, `created_s` is the wall clock's."""

    request_id: str
    received_s: float
    deadline_s: float
    created_s: int
    wants_timeline: bool
    tokenizer: TextTokenizer


@dataclass(frozen=True, slots=True)
class Plan:
    """`is_silent`: the answer's tokens are not wanted, only what is said about the prompt (max_tokens 0)."""

    request: CompletionRequest
    writer: Writer
    is_stream: bool
    with_timelines: bool
    is_silent: bool = False


def plan_chat(raw: Any, arrival: Arrival) -> Plan:
    """Of a body of /v1/chat/completions. Raises InvalidRequestError."""
    body = parse_chat(raw)
    num_logprobs = body.num_logprobs
    writer = ChatWriter(
        request_id=arrival.request_id,
        model=body.model,
        created_s=arrival.created_s,
        tokenizer=arrival.tokenizer,
        with_logprobs=num_logprobs is not None,
        usage_chunk=body.wants_usage_chunk or _with_timelines(body, arrival),
    )
    request = _request(body, arrival, (body.prompt(),), body.answer_tokens, num_logprobs, None)
    return Plan(request, writer, bool(body.stream), _with_timelines(body, arrival))


def plan_completion(raw: Any, arrival: Arrival) -> Plan:
    """Of a body of /v1/completions. Raises InvalidRequestError."""
    body = parse_completion(raw)
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    is_silent = max_tokens == 0
    if is_silent and not body.echo:
        raise InvalidRequestError("'max_tokens' may only be 0 together with 'echo'.", param="max_tokens")
    writer = CompletionWriter(
        request_id=arrival.request_id,
        model=body.model,
        created_s=arrival.created_s,
        tokenizer=arrival.tokenizer,
        prompts=tuple(body.prompt),
        n=1 if body.n is None else body.n,
        echo=bool(body.echo),
        with_logprobs=body.logprobs is not None,
        usage_chunk=body.wants_usage_chunk or _with_timelines(body, arrival),
        is_silent=is_silent,
    )
    prompt_logprobs = body.logprobs if body.echo else None
    # A worker draws at least one token: after the prompt has been looked at, it is the cheapest way to end.
    request = _request(body, arrival, tuple(body.prompt), max(max_tokens, is_silent), body.logprobs, prompt_logprobs)
    return Plan(request, writer, bool(body.stream), _with_timelines(body, arrival), is_silent)


def _with_timelines(body: CommonBody, arrival: Arrival) -> bool:
    return arrival.wants_timeline or body.wants_timeline


def _request(
    body: CommonBody,
    arrival: Arrival,
    prompts: tuple[Prompt, ...],
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> CompletionRequest:
    return CompletionRequest(
        request_id=arrival.request_id,
        model=body.model,
        prompts=prompts,
        received_s=arrival.received_s,
        sampling=body.sampling(logprobs, prompt_logprobs),
        seed=body.seed,
        max_tokens=max_tokens,
        stop=tuple(body.stop),
        n=1 if body.n is None else body.n,
        cache_salt=body.cache_salt or "",
        deadline_s=arrival.deadline_s,
    )

"""Bodies of /v1/chat/completions and /v1/completions -> what the text side is asked for."""

from dataclasses import dataclass
from typing import Any

from tandem.core.completion import CompletionRequest, SamplingDefaults
from tandem.core.errors import InvalidRequestError
from tandem.router.openai.bodies import ChatBody, CompletionBody
from tandem.router.openai.responses import ChatWriter, CompletionWriter
from tandem.router.openai.validation import validate
from tandem.router.request_context import RequestContext
from tandem.router.tokenizer import TextTokenizer

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions


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
    fields = validate(ChatBody, body)
    max_tokens = defaults.max_tokens if fields.limit is None else fields.limit
    request = fields.request(context, defaults, (fields.chat_prompt,), max_tokens, fields.num_logprobs)
    options = fields.response_options(context, with_logprobs=fields.num_logprobs is not None)
    return ParsedRequest(request, ChatWriter(request, tokenizer, options), fields.stream)


def parse_completion(
    body: Any, context: RequestContext, tokenizer: TextTokenizer, defaults: SamplingDefaults
) -> ParsedRequest:
    """Parse a body of /v1/completions. Raises InvalidRequestError that names the first wrong field."""
    fields = validate(CompletionBody, body)
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

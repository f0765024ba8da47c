"""Renders a conversation with the checkpoint's chat template, in a sandbox, with limits.

The template comes from the checkpoint, never from a client. Templates are written for the environment of
`transformers` (`utils/chat_template_utils.py`): trimmed blocks, `raise_exception`, `strftime_now`, a `tojson` that does
not escape HTML, loop controls, and `generation` blocks, which have no effect here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem.core.clock import Clock
from tandem.core.completion import ChatMessage
from tandem.core.errors import CheckpointError, InvalidRequestError
from tandem.router.limits import clipped

MAX_RENDERED_CHARS = 32 << 20
MAX_RENDER_S = 5.0


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks text for training; rendering keeps the content."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own convention

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """`special_tokens` are names for the template, such as `bos_token`. Raises CheckpointError for invalid source."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        clock: Clock,
        local_time: Callable[[], datetime] = datetime.now,
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: local_time().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"The checkpoint's chat template cannot be read: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._clock = clock

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt for the assistant's next message. Raises InvalidRequestError with the template's reason."""
        parts: list[str] = []
        num_chars = 0
        end_s = self._clock.now_s() + MAX_RENDER_S
        try:
            for part in self._template.generate(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            ):
                parts.append(part)
                num_chars += len(part)
                if num_chars > MAX_RENDERED_CHARS or self._clock.now_s() > end_s:
                    raise InvalidRequestError("The rendered conversation is too long.", param="messages")
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            reason = clipped(str(error) or type(error).__name__)
            raise InvalidRequestError(
                f"The model's chat template refused the messages: {reason}", param="messages"
            ) from error
        return "".join(parts)

"""Renders a conversation with the checkpoint's chat template, in a sandbox, with limits.

The template comes from the checkpoint, never from a client. Templates are written for the environment of
`transformers` (`utils/chat_template_utils.py`): trimmed blocks, `raise_exception`, `strftime_now`, a `tojson` that does
not escape HTML, loop controls, and `generation` blocks, which have no effect here.

A damaged template ends with an error: the length of the rendered text is limited, and so are the time, which every
round of a loop and every call of a macro checks, and the results of `*`, `**` and `%`. A template that was written to
use up memory still can.
"""

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem.core.clock import Clock
from tandem.core.completion import ChatMessage
from tandem.core.errors import CheckpointError, InvalidRequestError
from tandem.router.limits import clipped

MAX_RENDERED_CHARS = 32 << 20
MAX_RENDER_S = 5.0
_MAX_OPERAND_BITS = 1 << 16
_CHECK_TIME = "tandem_check_time"
_WIDE_FORMAT = re.compile(r"%[^%a-zA-Z]*(?:\d{5}|\*)")


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks text for training; rendering keeps the content."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own convention

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Limits the results of operators that can make large ones from small operands."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            is_large = isinstance(left, str) and _WIDE_FORMAT.search(left) is not None
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            is_large = bits > _MAX_OPERAND_BITS
        else:
            is_large = any(
                isinstance(count, int)
                and isinstance(value, str | list | tuple)
                and len(value) * count > MAX_RENDERED_CHARS
                for value, count in ((left, right), (right, left))
            )
        if is_large:
            raise jinja2.TemplateRuntimeError(f"the result of '{operator}' is too large")
        return super().call_binop(context, operator, left, right)


def _add_time_checks(template: nodes.Template) -> None:
    """Check the time in every loop and macro, the only ways to repeat anything."""
    blocks: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
        *template.find_all(nodes.For), *template.find_all(nodes.Macro), *template.find_all(nodes.CallBlock)
    ]  # fmt: skip
    for block in blocks:
        check = nodes.Filter(nodes.Name(_CHECK_TIME, "load"), _CHECK_TIME, [], [], None, None)
        block.body.insert(0, nodes.ExprStmt(check).set_lineno(block.lineno))


def _call(function: Callable[[], None]) -> None:
    function()


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
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.filters[_CHECK_TIME] = _call  # a filter costs a tenth of a call in the sandbox
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: local_time().strftime(form)
        try:
            template = environment.parse(source)
            _add_time_checks(template)
            self._template = environment.from_string(template.set_environment(environment))  # type: ignore[arg-type]
        except Exception as error:  # also what Python's compiler raises for deep nesting
            raise CheckpointError(f"The checkpoint's chat template cannot be read: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._clock = clock

    def check_speed(self) -> None:
        """Raises CheckpointError if the template does not end in time for a short conversation."""
        start_s = self._clock.now_s()
        with contextlib.suppress(InvalidRequestError):  # a template may ask for other messages
            self.render((ChatMessage("user", "hello"),))
        if self._clock.now_s() - start_s > MAX_RENDER_S:
            raise CheckpointError(
                f"The checkpoint's chat template does not render a short conversation in {MAX_RENDER_S:g} s."
            )

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt for the assistant's next message. Raises InvalidRequestError with the template's reason."""
        parts: list[str] = []
        num_chars = 0
        end_s = self._clock.now_s() + MAX_RENDER_S

        def check_time() -> None:
            if self._clock.now_s() > end_s:
                raise InvalidRequestError("The rendered conversation is too long.", param="messages")

        try:
            for part in self._template.generate(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **(self._special_tokens | {_CHECK_TIME: check_time}),
            ):
                parts.append(part)
                num_chars += len(part)
                check_time()
                if num_chars > MAX_RENDERED_CHARS:
                    raise InvalidRequestError("The rendered conversation is too long.", param="messages")
        except InvalidRequestError:
            raise
        except Exception as error:  # a template may raise anything
            reason = clipped(str(error) or type(error).__name__)
            raise InvalidRequestError(
                f"The model's chat template refused the messages: {reason}", param="messages"
            ) from error
        return "".join(parts)

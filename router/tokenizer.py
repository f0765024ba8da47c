"""Text <-> token ids, with the checkpoint's tokenizer.json, tokenizer_config.json and chat template."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from datetime import datetime
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from tokenizers import Tokenizer

from tandem.core.clock import Clock
from tandem.core.completion import ChatMessage
from tandem.core.errors import CheckpointError, ContextLengthError, InternalError, InvalidRequestError
from tandem.router.chat_template import ChatTemplate
from tandem.router.control_tokens import ControlTokens
from tandem.router.detokenizer import Detokenizer, token_table
from tandem.router.token_length import max_chars_per_token
from tandem.router.tokenizer_files import library_errors, read_tokenizer_files

_LOG = logging.getLogger(__name__)

T = TypeVar("T")
Ids = TypeVar("Ids", bound=Sequence[int])
Ts = TypeVarTuple("Ts")

_INLINE_CHARS = 4096  # about 1 ms of tokenizing; longer text is tokenized in a thread, which costs 0.1 ms
_MAX_PROBES = 1000
_USUAL_TOKEN_CHARS = 4


class TextTokenizer:
    """One checkpoint's tokenizer. Safe for use by many requests at once.

    `eos_token_ids` end a generation: those of generation_config.json, config.json and tokenizer_config.json together.
    `vocab_size` is the model's: every token id is below it. Names of control tokens in the text of users are text,
    unless `parse_control_tokens` is set. `template_names` are those of chat templates none of which is the default.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        executor: Executor,
        eos_token_ids: frozenset[int] = frozenset(),
        vocab_size: int | None = None,
        chat_template: ChatTemplate | None = None,
        template_names: tuple[str, ...] = (),
        parse_control_tokens: bool = False,
    ) -> None:
        """Raises CheckpointError for a tokenizer that cannot be used."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._executor = executor
        self._chat_template = chat_template
        self._template_names = template_names
        self.eos_token_ids = eos_token_ids
        self.vocab_size = vocab_size or tokenizer.get_vocab_size()
        special = {token_id: token for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._table = token_table(tokenizer, frozenset(special))
        self._before, self._after = _added_around(tokenizer)
        self._max_chars_per_token = max_chars_per_token(tokenizer)
        self._control = None if parse_control_tokens else ControlTokens(tokenizer, special)
        self._may_exceed = max(tokenizer.get_vocab().values()) >= self.vocab_size
        if self._may_exceed and max((*self._before, *self._after), default=0) >= self.vocab_size:
            raise CheckpointError(
                "The checkpoint's tokenizer.json adds a token to every text whose id is not in the model's vocabulary "
                f"of {self.vocab_size} tokens."
            )

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        clock: Clock,
        executor: Executor,
        local_time: Callable[[], datetime] = datetime.now,
        parse_control_tokens: bool = False,
    ) -> "TextTokenizer":
        """Read a checkpoint folder. Raises CheckpointError for a missing or damaged file."""
        files = read_tokenizer_files(folder)
        template = None
        if files.chat_template is not None:
            template = ChatTemplate(files.chat_template, files.named_tokens, clock, local_time)
            template.check_speed()
        with library_errors("tokenizer.json"):
            return cls(
                files.tokenizer,
                executor=executor,
                eos_token_ids=files.eos_token_ids,
                vocab_size=files.vocab_size,
                chat_template=template,
                template_names=files.template_names,
                parse_control_tokens=parse_control_tokens,
            )

    async def encode(self, text: str, max_tokens: int | None = None) -> tuple[int, ...]:
        """Ids of a text, with the special tokens that the tokenizer adds.

        Raises InvalidRequestError, and ContextLengthError for more than `max_tokens` ids: for most texts that are much
        too long before they are tokenized.
        """
        if len(text) <= _INLINE_CHARS:
            return self._encode_now(text, max_tokens)
        return await self._in_thread(self._encode_now, text, max_tokens)

    async def encode_chat(self, messages: Sequence[ChatMessage], max_tokens: int | None = None) -> tuple[int, ...]:
        """Ids of a conversation. The template writes all special tokens. Raises what `encode` raises."""
        if self._chat_template is None:
            names = ", ".join(self._template_names)
            reason = f"has several chat templates ({names}) and no default" if names else "has no chat template"
            raise InvalidRequestError(
                f"This model {reason}; send its text to /v1/completions instead.", param="messages"
            )
        if sum(len(message.content) for message in messages) <= _INLINE_CHARS:
            return self._encode_chat_now(self._chat_template, messages, max_tokens)
        return await self._in_thread(self._encode_chat_now, self._chat_template, messages, max_tokens)

    def _encode_now(self, text: str, max_tokens: int | None = None) -> tuple[int, ...]:
        self._check_length(text, max_tokens)
        if self._control is None:
            ids = self._encoded(self._encode_parsed, text)
        else:
            ids = self._encoded(self._control.encode_text, text)
        return _limited((*self._before, *ids, *self._after), max_tokens)

    def _encode_chat_now(
        self, template: ChatTemplate, messages: Sequence[ChatMessage], max_tokens: int | None = None
    ) -> tuple[int, ...]:
        """The ids of the rendered text, if its control tokens are the template's.

        They are if they are the same in messages without names of control tokens; else these messages decide.
        """
        text = template.render(messages)
        self._check_length(text, max_tokens)
        ids = _limited(self._encoded(self._encode_parsed, text), max_tokens)
        control = self._control
        if control is None:
            return tuple(ids)
        disguised = [_disguised(message, control) for message in messages]
        if disguised == list(messages):
            return tuple(ids)
        rendered = template.render(disguised)
        if control.are_as_in(ids, rendered):
            return tuple(ids)
        if any(control.is_ambiguous(message.role + message.content) for message in messages):
            raise InvalidRequestError("The messages have characters of a private use area.", param="messages")
        return _limited(tuple(self._encoded(control.encode_disguised, rendered)), max_tokens)

    def _check_length(self, text: str, max_tokens: int | None) -> None:
        """Raises ContextLengthError for most texts that are much too long; InvalidRequestError."""
        if max_tokens is None:
            return
        if self._max_chars_per_token is not None:
            least = -(-len(text) // self._max_chars_per_token)
            if least > max_tokens:
                raise _too_long(f"at least {least}", max_tokens)
        if len(text) > _USUAL_TOKEN_CHARS * max_tokens:
            # The tokens of its beginning are those of the whole text but for the last few.
            beginning = self._encoded(self._encode_parsed, text[: _USUAL_TOKEN_CHARS * max_tokens])
            if len(beginning) > max_tokens + max_tokens // 8 + 64:
                raise _too_long(f"more than {max_tokens}", max_tokens)

    def _encode_parsed(self, text: str) -> list[int]:
        # unlike `encode`, the batch call releases the interpreter's lock
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _encoded(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        """Raises InvalidRequestError for text that has no ids, InternalError if the library fails."""
        try:
            with library_errors("tokenizer.json"):
                ids = encode(text)
        except CheckpointError as error:
            if isinstance(error.__cause__, TypeError):
                raise InvalidRequestError(
                    "The text is not valid Unicode: it holds half of a surrogate pair."
                ) from error.__cause__
            _LOG.exception("a text cannot be tokenized")
            raise InternalError("The text cannot be tokenized; the router's log has the reason.") from error
        if self._may_exceed and ids and max(ids) >= self.vocab_size:
            token = self._tokenizer.id_to_token(max(ids))
            raise InvalidRequestError(f"The text has the token '{token}', which is not in the model's vocabulary.")
        return ids

    async def _in_thread(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def decode(self, token_ids: Sequence[int], *, is_continued: bool = False) -> str:
        """Text of all ids, without special tokens; of a continued text without the bytes of an incomplete character."""
        detokenizer = self.detokenizer()
        text = "".join(map(detokenizer.push, token_ids))
        return text if is_continued else text + detokenizer.flush()

    def detokenizer(self, prompt: Sequence[int] = (), *, keeps_prompt_end: bool = False) -> Detokenizer:
        """A new detokenizer, for one choice; see `TokenTable.detokenizer`."""
        return self._table.detokenizer(prompt, keeps_prompt_end=keeps_prompt_end)

    def spelling(self, token_id: int) -> bytes:
        """Bytes of one token; the name of a special token. Not always complete UTF-8 characters."""
        return self._table.spelling(token_id)


def _limited(ids: Ids, max_tokens: int | None) -> Ids:
    """Raises ContextLengthError for more than `max_tokens` ids."""
    if max_tokens is not None and len(ids) > max_tokens:
        raise _too_long(str(len(ids)), max_tokens)
    return ids


def _too_long(count: str, max_tokens: int) -> ContextLengthError:
    return ContextLengthError(
        f"The prompt has {count} tokens, but at most {max_tokens} fit: the maximum context length is {max_tokens + 1} "
        "tokens, prompt and output together.",
        param="prompt",
    )


def _disguised(message: ChatMessage, control: ControlTokens) -> ChatMessage:
    """Templates make control tokens of roles, such as <|user|>, so a role that is a plain word stays."""
    role = message.role if message.role.isidentifier() else control.disguise(message.role)
    return ChatMessage(role, control.disguise(message.content))


def _added_around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before and after a text. Raises CheckpointError if it does anything else."""
    probes = itertools.chain(("a b",), (tokenizer.decode([token_id]) for token_id in range(_MAX_PROBES)))
    probe = next((text for text in probes if tokenizer.encode(text, add_special_tokens=False).ids), "")
    inner = tokenizer.encode(probe, add_special_tokens=False).ids
    outer = tokenizer.encode(probe).ids
    for start in range(len(outer) - len(inner), -1, -1):
        stop = start + len(inner)
        if outer[start:stop] == inner:
            return tuple(outer[:start]), tuple(outer[stop:])
    raise CheckpointError("The post-processor of the checkpoint's tokenizer.json changes the tokens of a text.")

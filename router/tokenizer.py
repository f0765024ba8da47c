"""Text <-> token ids, with the checkpoint's tokenizer.json, tokenizer_config.json and chat template."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from tokenizers import Tokenizer, decoders

from tandem.core.clock import Clock
from tandem.core.completion import ChatMessage
from tandem.core.errors import CheckpointError, InvalidRequestError
from tandem.router.chat_template import ChatTemplate
from tandem.router.detokenizer import ByteDetokenizer, ByteTable, Detokenizer, WindowDetokenizer

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_INLINE_CHARS = 4096  # about 1 ms of tokenizing; longer text is tokenized in a thread, which costs 0.1 ms
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TextTokenizer:
    """One checkpoint's tokenizer. Safe for use by many requests at once.

    `eos_token_ids` end a generation: those of generation_config.json, config.json and tokenizer_config.json together.
    `vocab_size` is the model's: every token id is below it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        executor: Executor,
        eos_token_ids: frozenset[int] = frozenset(),
        vocab_size: int | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._executor = executor
        self._chat_template = chat_template
        self.eos_token_ids = eos_token_ids
        self.vocab_size = vocab_size or tokenizer.get_vocab_size()
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._byte_table = ByteTable(tokenizer, self._special_ids) if byte_level else None

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        clock: Clock,
        executor: Executor,
        local_time: Callable[[], datetime] = datetime.now,
    ) -> "TextTokenizer":
        """Read a checkpoint folder. Raises CheckpointError for a missing or damaged file."""
        try:
            tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"The checkpoint's tokenizer.json cannot be read: {error}") from error
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"The checkpoint's tokenizer.json is damaged: {error}") from error
        settings = _read_json(folder / "tokenizer_config.json")
        config = _read_json(folder / "config.json")
        names = _special_token_names(settings)
        source = _template_source(folder, settings)
        return cls(
            tokenizer,
            executor=executor,
            eos_token_ids=_eos_token_ids(tokenizer, names, config, _read_json(folder / "generation_config.json")),
            vocab_size=config.get("vocab_size"),
            chat_template=None if source is None else ChatTemplate(source, names, clock, local_time),
        )

    async def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, with the special tokens that the tokenizer adds. Raises InvalidRequestError."""
        return await self._encode(text, add_special_tokens=True)

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Ids of a conversation. The template writes all special tokens. Raises InvalidRequestError."""
        if self._chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template; send its text to /v1/completions instead.", param="messages"
            )
        if sum(len(message.content) for message in messages) <= _INLINE_CHARS:
            rendered = self._chat_template.render(messages)
        else:
            rendered = await self._in_thread(self._chat_template.render, messages)
        return await self._encode(rendered, add_special_tokens=False)

    async def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        if len(text) <= _INLINE_CHARS:
            return self._encode_now(text, add_special_tokens)
        return await self._in_thread(self._encode_now, text, add_special_tokens)

    def _encode_now(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        try:  # unlike `encode`, the batch call releases the interpreter's lock
            return tuple(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
        except TypeError as error:
            raise InvalidRequestError("The text is not valid Unicode: it holds half of a surrogate pair.") from error

    async def _in_thread(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of all ids, without special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def detokenizer(self) -> Detokenizer:
        """A new detokenizer, for one choice."""
        if self._byte_table is not None:
            return ByteDetokenizer(self._byte_table)
        return WindowDetokenizer(self._tokenizer, self._special_ids)

    def spelling(self, token_id: int) -> bytes:
        """Bytes of one token; the name of a special token. Not always complete UTF-8 characters."""
        if self._byte_table is not None:
            return self._byte_table.spelling(token_id)
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The checkpoint's {path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"The checkpoint's {path.name} is not a JSON object.")
    return content


def _special_token_names(settings: Mapping[str, Any]) -> dict[str, str]:
    names = {}
    for name in _NAMED_TOKENS:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            names[name] = value
    return names


def _template_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """From chat_template.jinja, else from tokenizer_config.json; `default` if that has several templates."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    source = settings.get("chat_template")
    if isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if source is not None and not isinstance(source, str):
        raise CheckpointError("The checkpoint's chat template is not text.")
    return source


def _eos_token_ids(
    tokenizer: Tokenizer, names: Mapping[str, str], config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> frozenset[int]:
    found: set[int] = set()
    for source in (config, generation_config):
        value = source.get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        found.update(token_id for token_id in values if isinstance(token_id, int))
    if (eos := names.get("eos_token")) is not None and (token_id := tokenizer.token_to_id(eos)) is not None:
        found.add(token_id)
    return frozenset(found)

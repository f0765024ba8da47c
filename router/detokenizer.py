"""Token ids -> text, token by token, at a constant cost per token.

Every token stands for bytes or for text, whatever its neighbours are; only the first token of a text may lose a leading
space. The prompt counts as text before the answer, so the answer keeps its first space. There are two kinds:

- Byte-level tokenizers (GPT-2, OPT, Llama 3, Qwen): every token stands for bytes. An incremental UTF-8 decoder over
  these bytes gives the same text as decoding all ids together, malformed sequences included.
- All others (SentencePiece-like: Llama 2, Mistral; Unigram; WordPiece): a token stands for text, and with byte fallback
  some tokens stand for one byte each. The result is the same as decoding all ids together, with one exception: the
  `tokenizers` library replaces all bytes of a run that is not valid UTF-8, and this module, as SentencePiece, keeps the
  characters of the run that are complete. A character can therefore be returned with its last byte.

Text is returned when later tokens cannot change it: a character whose bytes belong to several tokens is returned with
the last one.
"""

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

from tandem.core.errors import CheckpointError

_REPLACEMENT = "\ufffd"
_PROMPT_END_TOKENS = 64  # number of a prompt's last tokens that are examined
_MAX_FIRST_TOKENS = 16  # tokens without text at the beginning of a text that are decoded together
_MAX_CHAR_BYTES = 4
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_INVALID_BYTE = re.compile("[\udc80-\udcff]")  # as the error handler `surrogateescape` writes it
_LOCAL_DECODERS = frozenset({"Replace", "ByteFallback", "Metaspace", "WordPiece", "Strip", "Fuse"})


class Detokenizer(Protocol):
    """Turns the tokens of one choice into text."""

    def push(self, token_id: int) -> str:
        """Text that is complete with this token; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """Text that is still held after the last token, with replacement characters for incomplete ones."""
        ...


class TokenTable(Protocol):
    """What the tokens of one vocabulary stand for."""

    def spelling(self, token_id: int) -> bytes:
        """The name of a special token, the bytes of any other token; empty for an id outside the vocabulary."""
        ...

    def detokenizer(self, prompt: Sequence[int], *, keeps_prompt_end: bool) -> Detokenizer:
        """For tokens that follow a prompt.

        A prompt may end inside of a character. If the following tokens complete the character, they get all of it. If
        they do not, the replacement characters belong to the prompt's text and are not returned, except with
        `keeps_prompt_end`.
        """
        ...


def token_table(tokenizer: Tokenizer, special_ids: frozenset[int]) -> TokenTable:
    """Raises CheckpointError for a decoder whose text of a token depends on the tokens around it."""
    steps = _decoder_steps(tokenizer)
    kinds = [step.get("type") for step in steps]
    if [kind for kind in kinds if kind != "Fuse"] == ["ByteLevel"]:
        return ByteTable(tokenizer, special_ids)
    fuse = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    is_local = _LOCAL_DECODERS.issuperset(kinds) and all(
        step["type"] == "Fuse" or (step["type"] == "Strip" and not step["stop"]) for step in steps[fuse:]
    )
    if not is_local:
        names = ", ".join(str(kind) for kind in kinds)
        raise CheckpointError(f"The decoder of the checkpoint's tokenizer.json ({names}) is not supported.")
    return TextTable(tokenizer, special_ids, has_byte_tokens="ByteFallback" in kinds)


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The settings of the decoder, or of each decoder of a sequence; empty without a decoder."""
    if tokenizer.decoder is None:
        return []
    steps: list[dict[str, Any]] = []
    waiting = [json.loads(tokenizer.decoder.__getstate__())]
    while waiting:
        step = waiting.pop()
        if step["type"] == "Sequence":
            waiting.extend(reversed(step["decoders"]))
        else:
            steps.append(step)
    return steps


def byte_level_alphabet() -> dict[str, int]:
    """The printable characters that stand for the 256 bytes in a byte-level vocabulary (Radford et al., GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


class ByteTable:
    """A `TokenTable` of a byte-level vocabulary. Bytes are cached per id."""

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._alphabet = byte_level_alphabet()
        self._bytes: dict[int, bytes] = {}

    def spelling(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) or ""
        if token_id in self._special_ids:
            return token.encode()
        try:
            return bytes(self._alphabet[char] for char in token)
        except KeyError:  # an added token is plain text
            return token.encode()

    def visible(self, token_id: int) -> bytes:
        """Bytes of a token in text; empty for a special token."""
        found = self._bytes.get(token_id)
        if found is None:
            found = b"" if token_id in self._special_ids else self.spelling(token_id)
            self._bytes[token_id] = found
        return found

    def detokenizer(self, prompt: Sequence[int], *, keeps_prompt_end: bool) -> "ByteDetokenizer":
        end = b""
        for token_id in reversed(prompt[-_PROMPT_END_TOKENS:]):
            end = self.visible(token_id) + end
            if len(end) >= _MAX_CHAR_BYTES:
                break
        return ByteDetokenizer(self, end[-_MAX_CHAR_BYTES:], keeps_prompt_end=keeps_prompt_end)


class ByteDetokenizer:
    """`prompt_end` are the prompt's last bytes, as many as one character may have."""

    def __init__(self, table: ByteTable, prompt_end: bytes, *, keeps_prompt_end: bool) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(prompt_end)
        self._is_complete = not self._decoder.getstate()[0]  # no character lacks bytes
        self._num_shown = 0 if self._is_complete or keeps_prompt_end else 1

    def push(self, token_id: int) -> str:
        spelling = self._table.visible(token_id)
        if self._is_complete and spelling.isascii():  # the usual case, four times as fast
            return spelling.decode("ascii")
        text = self._decoder.decode(spelling)
        self._is_complete = not self._decoder.getstate()[0]
        return self._without_prompt_end(text) if self._num_shown and text else text

    def flush(self) -> str:
        return self._without_prompt_end(self._decoder.decode(b"", final=True))

    def _without_prompt_end(self, text: str) -> str:
        shown, self._num_shown = self._num_shown * _REPLACEMENT, 0
        return text.removeprefix(shown)


class TextTable:
    """A `TokenTable` of a vocabulary whose tokens stand for text, or for one byte each (`has_byte_tokens`).

    What a token stands for is what decoding adds to the text of an ordinary token before it. Results are cached per id.
    """

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int], *, has_byte_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._has_byte_tokens = has_byte_tokens
        self._pieces: dict[int, str | bytes] = {}
        self._before = self._find_before()
        self._before_text = self.decode(self._before)

    def _find_before(self) -> list[int]:
        """An ordinary token that has text, if there is one."""
        for token_id in range(self._tokenizer.get_vocab_size()):
            if token_id in self._special_ids or self._byte(token_id) is not None:
                continue
            text = self.decode([token_id])
            if text.strip() and len(self.decode([token_id, token_id])) > len(text):
                return [token_id]
        return []

    def _byte(self, token_id: int) -> bytes | None:
        if not self._has_byte_tokens:
            return None
        match = _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "")
        return None if match is None else bytes.fromhex(match[1])

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def visible(self, token_id: int) -> str | bytes:
        """The text or the byte of a token; empty for a special token."""
        piece = self._pieces.get(token_id)
        if piece is None:
            if token_id in self._special_ids:
                piece = ""
            else:
                piece = self._byte(token_id)
                if piece is None:
                    piece = self.decode([*self._before, token_id])[len(self._before_text) :]
            self._pieces[token_id] = piece
        return piece

    def spelling(self, token_id: int) -> bytes:
        if token_id in self._special_ids:
            return (self._tokenizer.id_to_token(token_id) or "").encode()
        piece = self.visible(token_id)
        return piece.encode() if isinstance(piece, str) else piece

    def detokenizer(self, prompt: Sequence[int], *, keeps_prompt_end: bool) -> "TextDetokenizer":
        end = b""
        follows_text = len(prompt) > _PROMPT_END_TOKENS
        for token_id in reversed(prompt[-_PROMPT_END_TOKENS:]):
            piece = self.visible(token_id)
            follows_text = follows_text or bool(piece)
            if isinstance(piece, str) and piece:
                break
            if isinstance(piece, bytes):
                end = piece + end
                if len(end) == _MAX_CHAR_BYTES:
                    break
        return TextDetokenizer(self, end, follows_text=follows_text, keeps_prompt_end=keeps_prompt_end)


class TextDetokenizer:
    """`prompt_end` are the bytes of the prompt's last tokens, as many as one character may have.

    Unless text comes before (`follows_text`), the first tokens are decoded together until they have text, since the
    decoder drops a leading space.
    """

    def __init__(self, table: TextTable, prompt_end: bytes, *, follows_text: bool, keeps_prompt_end: bool) -> None:
        self._table = table
        self._first: list[int] | None = None if follows_text else []
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._decoder.decode(prompt_end)
        held = self._decoder.getstate()[0]
        self._holds_bytes = bool(held)
        self._num_shown = 0 if keeps_prompt_end else len(held)

    def push(self, token_id: int) -> str:
        piece = self._table.visible(token_id)
        if self._first is None:
            if isinstance(piece, bytes):
                return self._read(piece)
            if not self._holds_bytes or not piece:
                return piece
            return self._read(b"", final=True) + piece
        return self._push_first(self._first, token_id, piece) if piece else ""

    def _push_first(self, first: list[int], token_id: int, piece: str | bytes) -> str:
        if isinstance(piece, bytes) and piece != b" ":
            self._first = None
            return self._read(piece)
        first.append(token_id)
        text = self._table.decode(first)
        if text or len(first) == _MAX_FIRST_TOKENS:
            self._first = None
        return text

    def flush(self) -> str:
        return self._read(b"", final=True)

    def _read(self, piece: bytes, *, final: bool = False) -> str:
        """Each byte that is not part of a character is one replacement character."""
        text = self._decoder.decode(piece, final=final)
        self._holds_bytes = bool(self._decoder.getstate()[0])
        if not text.isascii():
            text = _INVALID_BYTE.sub(_REPLACEMENT, text)
        if self._num_shown and text:
            shown, self._num_shown = self._num_shown * _REPLACEMENT, 0
            text = text.removeprefix(shown)
        return text

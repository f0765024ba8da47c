"""Token ids -> text, token by token, at a constant cost per token.

Text is returned when later tokens cannot change it: a character whose bytes belong to several tokens is returned with
the last one. There are two methods; the tokenizer decides which one is used:

- Byte-level tokenizers (GPT-2, OPT, Llama 3, Qwen): every token stands for bytes. An incremental UTF-8 decoder over
  these bytes gives the same text as decoding all ids together, malformed sequences included.
- All others (SentencePiece-like: Llama 2, Mistral): decode a short window of recent ids with and without the new id;
  the difference is the new text. The window begins at a complete character, and before a token whose text is already
  returned, so that leading spaces are right (the decoder drops them only at the beginning of a text).
"""

import codecs
from typing import Protocol

from tokenizers import Tokenizer

_MAX_HELD_TOKENS = 16  # a character has at most four bytes; a longer sequence is malformed
_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Turns the tokens of one choice into text."""

    def push(self, token_id: int) -> str:
        """Text that is complete with this token; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """Text that is still held after the last token, with replacement characters for incomplete ones."""
        ...


def byte_level_alphabet() -> dict[str, int]:
    """The printable characters that stand for the 256 bytes in a byte-level vocabulary (Radford et al., GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


class ByteTable:
    """Bytes of the tokens of a byte-level vocabulary, cached per id."""

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._alphabet = byte_level_alphabet()
        self._bytes: dict[int, bytes] = {}

    def spelling(self, token_id: int) -> bytes:
        """The name of a special token, the bytes of any other token; empty for an id outside the vocabulary."""
        token = self._tokenizer.id_to_token(token_id) or ""
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


class ByteDetokenizer:
    def __init__(self, table: ByteTable) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_complete = True  # no character lacks bytes

    def push(self, token_id: int) -> str:
        spelling = self._table.visible(token_id)
        if self._is_complete and spelling.isascii():  # the usual case, four times as fast
            return spelling.decode("ascii")
        text = self._decoder.decode(spelling)
        self._is_complete = not self._decoder.getstate()[0]
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """`_returned` are the last ids whose text (`_returned_text`) was returned, `_held` the ids after them."""

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._returned: list[int] = []
        self._held: list[int] = []
        self._returned_text = ""

    def push(self, token_id: int) -> str:
        if token_id in self._special_ids:
            return ""
        self._held.append(token_id)
        return self._take(force=len(self._held) > _MAX_HELD_TOKENS)

    def flush(self) -> str:
        return self._take(force=True)

    def _take(self, *, force: bool) -> str:
        text = self._tokenizer.decode(self._returned + self._held)
        grown = len(text) > len(self._returned_text)
        if not force and (not grown or text.endswith(_REPLACEMENT)):
            return ""
        added = text[len(self._returned_text) :]
        if grown:
            self._returned = self._held
            self._returned_text = self._tokenizer.decode(self._returned)
        self._held = []
        return added

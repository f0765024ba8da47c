"""Token ids -> text, piece by piece, at a constant cost per token.

A piece is given out as soon as it cannot change any more: a character whose bytes are spread over several tokens waits
for the last of them. Two ways, chosen once per tokenizer:

- Byte-level tokenizers (GPT-2, OPT, Llama 3, Qwen): every token stands for bytes, so an incremental UTF-8 decoder over
  these bytes gives exactly what decoding all ids at once would, malformed sequences included.
- All others (SentencePiece-like: Llama 2, Mistral): decode a short window of recent ids with and without the new one;
  what the new one adds is the difference. The window begins at a whole character, and before a token that is already
  given out, so that leading spaces come out right (they are dropped only at the very beginning of a text).
"""

import codecs
from typing import Protocol

from tokenizers import Tokenizer

_MAX_HELD_TOKENS = 16  # an incomplete character has at most four bytes; more is malformed and goes out as it is
_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Follows one choice."""

    def push(self, token_id: int) -> str:
        """What this token lets out; empty while a character is not whole."""
        ...

    def flush(self) -> str:
        """What was still held at the end: replacement characters for what never became whole."""
        ...


def byte_level_alphabet() -> dict[str, int]:
    """The printable characters that stand for the 256 bytes in a byte-level vocabulary (Radford et al., GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


class ByteTable:
    """Bytes of each token of a byte-level vocabulary, looked up once per id and kept."""

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._alphabet = byte_level_alphabet()
        self._bytes: dict[int, bytes] = {}

    def spelling(self, token_id: int) -> bytes:
        """A special token's name, any other token's bytes; nothing for an id that the vocabulary lacks."""
        token = self._tokenizer.id_to_token(token_id) or ""
        try:
            return bytes(self._alphabet[char] for char in token)
        except KeyError:  # an added token, spelled in plain text
            return token.encode()

    def visible(self, token_id: int) -> bytes:
        """As in text, where special tokens are left out."""
        found = self._bytes.get(token_id)
        if found is None:
            found = b"" if token_id in self._special_ids else self.spelling(token_id)
            self._bytes[token_id] = found
        return found


class ByteDetokenizer:
    def __init__(self, table: ByteTable) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_whole = True  # no character waits for the rest of its bytes

    def push(self, token_id: int) -> str:
        spelling = self._table.visible(token_id)
        if self._is_whole and spelling.isascii():  # nearly always, and in a quarter of the time
            return spelling.decode("ascii")
        text = self._decoder.decode(spelling)
        self._is_whole = not self._decoder.getstate()[0]
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """`_given` are the last ids whose text is out (it is `_known`), `_fresh` those whose text is not."""

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._given: list[int] = []
        self._fresh: list[int] = []
        self._known = ""

    def push(self, token_id: int) -> str:
        if token_id in self._special_ids:
            return ""
        self._fresh.append(token_id)
        return self._take(force=len(self._fresh) > _MAX_HELD_TOKENS)

    def flush(self) -> str:
        return self._take(force=True)

    def _take(self, *, force: bool) -> str:
        text = self._tokenizer.decode(self._given + self._fresh)
        grown = len(text) > len(self._known)
        if not force and (not grown or text.endswith(_REPLACEMENT)):
            return ""
        added = text[len(self._known) :]
        if grown:
            self._given = self._fresh
            self._known = self._tokenizer.decode(self._given)
        self._fresh = []
        return added

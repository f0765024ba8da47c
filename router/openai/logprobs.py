"""Names of tokens in responses, and the lists of log-probabilities of /v1/completions."""

from collections.abc import Sequence
from typing import Any

from tandem.core.request import SampledToken, TokenLogprob
from tandem.router.tokenizer import TextTokenizer

_LOWEST_LOGPROB = -9999.0


class LegacyLogprobs:
    """The `logprobs` objects of one choice of /v1/completions, chunk by chunk.

    An offset is that of the token's first character in the returned text; a special token has no characters there.
    `top_logprobs` always has the drawn token, so it may have one token more than the request asked for.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_token_ids: Sequence[int], *, echo: bool) -> None:
        self._tokenizer = tokenizer
        self._prompt_token_ids = prompt_token_ids
        self._detokenizer = tokenizer.detokenizer(prompt_token_ids, keeps_prompt_end=echo)
        self._next_offset = 0
        self._num_chars = 0
        self._offsets: list[int] = []
        self._tokens: list[tuple[int, TokenLogprob | None]] = []

    def add_prompt(self, text: str, logprobs: Sequence[TokenLogprob | None]) -> None:
        """The prompt's text as it is returned, and a log-probability for each of its tokens."""
        detokenizer = self._tokenizer.detokenizer()
        for token_id, logprob in zip(self._prompt_token_ids, logprobs, strict=False):
            self._add(token_id, logprob, len(detokenizer.push(token_id)), len(text))
        self._next_offset = self._num_chars = len(text)

    def add(self, text: str, tokens: Sequence[SampledToken]) -> None:
        """New text as it is returned, and new tokens; either may come later than the other."""
        self._num_chars += len(text)
        for token in tokens:
            self._add(token.token_id, token.logprob, len(self._detokenizer.push(token.token_id)))

    def _add(self, token_id: int, logprob: TokenLogprob | None, length: int, end: int | None = None) -> None:
        self._tokens.append((token_id, logprob))
        self._offsets.append(self._next_offset if end is None else min(self._next_offset, end))
        self._next_offset += length

    def take(self, *, is_last: bool) -> dict[str, Any] | None:
        """The log-probabilities added since the last call. Tokens after a stop string are at the end of the text."""
        tokens, offsets = self._tokens, self._offsets
        self._tokens, self._offsets = [], []
        if not tokens:
            return None
        return {
            "tokens": [self._name(token_id) for token_id, _ in tokens],
            "token_logprobs": [None if logprob is None else finite(logprob.logprob) for _, logprob in tokens],
            "top_logprobs": [None if logprob is None else self._top(logprob) for _, logprob in tokens],
            "text_offset": [min(offset, self._num_chars) for offset in offsets] if is_last else offsets,
        }

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """Names of the likeliest tokens with their log-probabilities. If two tokens have one name, the less likely one
        is named by its id."""
        top = {self._name(logprob.token_id): finite(logprob.logprob)}
        for token_id, value in logprob.top:
            if token_id != logprob.token_id:
                name = self._name(token_id)
                top[_id_name(token_id) if name in top else name] = finite(value)
        return top

    def _name(self, token_id: int) -> str:
        """The text of a token; of a part of a character its bytes, as OpenAI's API names it."""
        spelling = self._tokenizer.spelling(token_id)
        name = text_or_none(spelling) if spelling else _id_name(token_id)
        return f"bytes:{escaped(spelling)}" if name is None else name


def text_or_none(spelling: bytes) -> str | None:
    """None for a part of a character."""
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return None


def escaped(spelling: bytes) -> str:
    """Bytes as text: printable ASCII as it is, all else as \\x.."""
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in spelling)


def _id_name(token_id: int) -> str:
    return f"token_id:{token_id}"


def finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, _LOWEST_LOGPROB)

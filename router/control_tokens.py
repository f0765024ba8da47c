"""Encodes text so that only a chat template makes control tokens, never the text of a user.

Control tokens are the special tokens of the tokenizer, except the unknown token and ordinary words that some file also
calls special (a checkpoint may have "!" as its padding token). In a user's text their names are
ordinary text: `encode_text` gives the ids that the tokenizer gives if it does not look for special tokens. Other added
tokens, such as `<think>`, are words of the vocabulary and stay what they are.

In a rendered chat template, names of control tokens may come from the template or from a message. `disguise` replaces
in messages each character with which a control token's name begins or ends; then every name that is left in the
rendered text is the template's, whatever the template does with the messages, unless the template writes the
beginning and the end of a name around a message.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import AddedToken, Encoding, Tokenizer

from tandem.core.errors import CheckpointError, InvalidRequestError

_CONTROL_MARK = "\U0010fffe\U0010ffffcontrol\U0010ffff"  # has noncharacters, which no text uses
_CUT_MARK = "\U0010fffe\U0010ffffcut\U0010ffff"
_FIRST_DISGUISE = 0x10F000  # private use
_RARE_CHAR = "\U0010aaaa"
_MAX_CUTS = 8
_UNREADABLE = "The text has the name of a control token of this model, which cannot be read as text."


class ControlTokens:
    """`tokenizer` is changed: names of control tokens are compared with the text as it is, not as normalized."""

    def __init__(self, tokenizer: Tokenizer, special: Mapping[int, AddedToken]) -> None:
        """Raises CheckpointError if the added tokens cannot be read as text."""
        tokenizer.add_tokens([_exact(token) for _, token in sorted(special.items()) if token.normalized])
        self._tokenizer = tokenizer
        self._text_tokenizer = _without_control_tokens(tokenizer)
        unknown = {*_encode(self._text_tokenizer, _RARE_CHAR), tokenizer.token_to_id(_unknown_name(tokenizer))}
        self._names = {
            token_id: token.content
            for token_id, token in special.items()
            if token_id not in unknown and not self._is_word(token.content, token_id)
        }
        self._ids = {name: token_id for token_id, name in self._names.items()}
        mark_id, cut_id = map(self._text_tokenizer.token_to_id, (_CONTROL_MARK, _CUT_MARK))
        assert mark_id is not None
        assert cut_id is not None
        self._mark_id, self._cut_id = mark_id, cut_id
        self._not_text = frozenset((*self._names, mark_id, cut_id))
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        borders = {char for name in map(str.strip, self._ids) if name for char in (name[0], name[-1])}
        self._disguises = {char: chr(_FIRST_DISGUISE + index) for index, char in enumerate(sorted(borders))}
        self._undisguise = str.maketrans({hidden: char for char, hidden in self._disguises.items()})

    def _is_word(self, name: str, token_id: int) -> bool:
        return (name.isalnum() or len(name) == 1) and token_id in _encode(self._text_tokenizer, name)

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text without any control token. Raises InvalidRequestError if there is no such encoding."""
        ids = _encode(self._text_tokenizer, text)
        return ids if self._not_text.isdisjoint(ids) else self._encode_marked(text, ())

    def disguise(self, text: str) -> str:
        """A text of the same length in which no control token's name begins or ends."""
        for char, hidden in self._disguises.items():
            text = text.replace(char, hidden)
        return text

    def is_ambiguous(self, text: str) -> bool:
        """Whether a text has characters that `disguise` puts in place of others."""
        return any(hidden in text for hidden in self._disguises.values())

    def are_as_in(self, ids: Sequence[int], disguised: str) -> bool:
        """Whether the control tokens among `ids` are those that a disguised text names."""
        found = self._control_ids(ids)
        if found == [self._ids[match[0]] for match in self._pattern.finditer(disguised)]:
            return True
        return found == [token_id for token_id, _ in self._spans(disguised)]

    def encode_disguised(self, disguised: str) -> list[int]:
        """Ids of a disguised text, with the control tokens that it names, and with the other text undisguised."""
        spans = self._spans(disguised)
        parts, end = [], 0
        for _, (start, stop) in spans:
            parts.append(disguised[end:start])
            end = stop
        parts.append(disguised[end:])
        return self._encode_marked(
            _CONTROL_MARK.join(parts).translate(self._undisguise), [token_id for token_id, _ in spans]
        )

    def _control_ids(self, ids: Iterable[int]) -> list[int]:
        return list(filter(self._names.__contains__, ids))

    def _spans(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """The control tokens of a text, each with the characters from and to which it goes."""
        encoding = _encode_with_offsets(self._tokenizer, text)
        return [pair for pair in zip(encoding.ids, encoding.offsets, strict=True) if pair[0] in self._names]

    def _encode_marked(self, text: str, control_ids: Sequence[int]) -> list[int]:
        """Ids of a text with one of `control_ids` for each mark in it.

        Some vocabularies have control tokens as ordinary words, too (Unigram, WordLevel). Such a word is cut in two.
        """
        if _CUT_MARK in text:
            raise InvalidRequestError(_UNREADABLE)
        for _ in range(_MAX_CUTS):
            encoding = _encode_with_offsets(self._text_tokenizer, text)
            ids = encoding.ids
            wrong = [span for token_id, span in zip(ids, encoding.offsets, strict=True) if token_id in self._names]
            if not wrong:
                break
            cuts = [0, *((start + stop) // 2 for start, stop in wrong), len(text)]
            text = _CUT_MARK.join(text[start:stop] for start, stop in itertools.pairwise(cuts))
        marked = iter(control_ids)
        ids = [next(marked, -1) if token_id == self._mark_id else token_id for token_id in ids]
        if wrong or -1 in ids or next(marked, None) is not None or text.count(_CUT_MARK) != ids.count(self._cut_id):
            raise InvalidRequestError(_UNREADABLE)
        return [token_id for token_id in ids if token_id != self._cut_id]


def _exact(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=True,
    )


def _without_control_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer over the same vocabulary, which is not copied. It reads names of special tokens as text."""
    copied = Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        copied.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        copied.pre_tokenizer = tokenizer.pre_tokenizer
    added = tokenizer.get_added_tokens_decoder()
    copied.add_tokens([token for _, token in sorted(added.items())])
    if copied.get_added_tokens_decoder() != added:
        raise CheckpointError("The added tokens of the checkpoint's tokenizer.json have ids that leave gaps.")
    copied.add_tokens([AddedToken(mark, normalized=False) for mark in (_CONTROL_MARK, _CUT_MARK)])
    copied.encode_special_tokens = True
    return copied


def _unknown_name(tokenizer: Tokenizer) -> str:
    return getattr(tokenizer.model, "unk_token", None) or ""


# Unlike `encode`, the batch calls release the interpreter's lock.


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _encode_with_offsets(tokenizer: Tokenizer, text: str) -> Encoding:
    return tokenizer.encode_batch([text], add_special_tokens=False)[0]

"""How much text a token can stand for: text that is too long for the context is refused before it is tokenized."""

import json
from typing import Any

from tokenizers import Tokenizer

from tandem.router.detokenizer import byte_level_alphabet

_NFC_CHARS = 4  # the most characters that Unicode's canonical composition makes one of
_NORMALIZERS = {"NFC": _NFC_CHARS, "Prepend": 1}  # that keep a character, at least a share of one
_PRE_TOKENIZERS = frozenset({"ByteLevel", "Digits", "Metaspace", "Split"})


def max_chars_per_token(tokenizer: Tokenizer) -> int | None:
    """The most characters of text that one token stands for. None: there is no such bound, because this tokenizer drops
    text or makes one token of text of any length."""
    parts = json.loads(tokenizer.to_str())
    shrinkage = _shrinkage(parts["normalizer"])
    if shrinkage is None or not (_keeps_all(parts["pre_tokenizer"]) and _spells_all(parts)):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in parts["added_tokens"]):
        return None  # it takes any number of spaces
    return shrinkage * max(map(len, tokenizer.get_vocab()))


def _shrinkage(normalizer: dict[str, Any] | None) -> int | None:
    """How many characters of text may become one."""
    if normalizer is None:
        return 1
    if normalizer["type"] == "Sequence":
        factor = 1
        for part in normalizer["normalizers"]:
            of_part = _shrinkage(part)
            if of_part is None:
                return None
            factor *= of_part
        return factor
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return 1 if pattern is not None and len(pattern) <= len(normalizer["content"]) else None
    return _NORMALIZERS.get(normalizer["type"])


def _keeps_all(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(map(_keeps_all, pre_tokenizer["pretokenizers"]))
    return pre_tokenizer["type"] in _PRE_TOKENIZERS and pre_tokenizer.get("behavior") != "Removed"


def _spells_all(parts: dict[str, Any]) -> bool:
    """Whether the vocabulary has a spelling for every text: through its bytes."""
    model = parts["model"]
    if model["type"] != "BPE":
        return False
    if model["byte_fallback"]:
        return all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    is_byte_level = '"ByteLevel"' in json.dumps(parts["pre_tokenizer"])
    return is_byte_level and all(char in model["vocab"] for char in byte_level_alphabet())

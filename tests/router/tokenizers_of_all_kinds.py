"""Small tokenizers of every kind that checkpoints have, trained on the text of this folder."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import Decoder

SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
KINDS = ("byte_level", "llama2", "metaspace_first", "gemma", "unigram", "wordpiece", "no_decoder")


def corpus() -> Iterator[str]:
    for path in (Path(__file__), Path(__file__).with_name("front.py")):
        yield from path.read_text().splitlines()


def _llama_decoder(*, strips: bool) -> Decoder:
    steps: list[Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strips else []))


def _trained_bpe(tokenizer: Tokenizer) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIALS, *BYTE_TOKENS], show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    content = json.loads(tokenizer.to_str())  # what was named to the trainer became special
    content["added_tokens"] = content["added_tokens"][: len(SPECIALS)]
    return Tokenizer.from_str(json.dumps(content))


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def _llama2() -> Tokenizer:
    """As Llama 2 has it: a mark in place of spaces, bytes of unknown characters, no space at the beginning."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = _llama_decoder(strips=True)
    return _trained_bpe(tokenizer)


def _metaspace_first() -> Tokenizer:
    """As newer files of the Llama 2 kind have it: only the beginning of a text gets a space."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = _llama_decoder(strips=True)
    return _trained_bpe(tokenizer)


def _gemma() -> Tokenizer:
    """Spaces are replaced, and none is added or dropped."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = _llama_decoder(strips=False)
    return _trained_bpe(tokenizer)


def _unigram() -> Tokenizer:
    """Control tokens are words of the vocabulary, too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=list(SPECIALS), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=list(SPECIALS), show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def _no_decoder() -> Tokenizer:
    """Whole words, which decoding joins with spaces; a control token that stands alone is a word."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=300, special_tokens=list(SPECIALS), show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


_BUILDERS = {
    "byte_level": _byte_level,
    "llama2": _llama2,
    "metaspace_first": _metaspace_first,
    "gemma": _gemma,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "no_decoder": _no_decoder,
}


def build(kind: str) -> Tokenizer:
    """A new tokenizer with an ordinary added token, and a post-processor that puts <s> before a text."""
    return Tokenizer.from_str(_built(kind))


@cache
def _built(kind: str) -> str:
    tokenizer = _BUILDERS[kind]()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer.to_str()


def write_folder(tokenizer: Tokenizer, folder: Path, **settings: Any) -> Path:
    """A checkpoint folder without weights."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    written = {"tokenizer_class": "PreTrainedTokenizerFast"} | named | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    (folder / "config.json").write_text(json.dumps({"vocab_size": tokenizer.get_vocab_size()}))
    return folder

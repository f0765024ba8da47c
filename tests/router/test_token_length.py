"""No text has fewer tokens than the bound on a token's characters says."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tandem.core.errors import ContextLengthError
from tandem.router.token_length import max_chars_per_token
from tandem.router.tokenizer import TextTokenizer

TEXTS = st.text(st.sampled_from("  defaeoß\u0301\u0308é\u1f82你🙂\n"), max_size=60)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" " * 8 + "def " * 3, "ᾂᾂ" * 20, "éé" * 20], trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(["▁▁▁▁def", "▁def▁def▁def"] * 10, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:1]
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["byte level", "byte fallback"])
def test_no_text_has_fewer_tokens(tokenizer: Tokenizer) -> None:
    bound = max_chars_per_token(tokenizer)
    assert bound is not None

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(TEXTS)
    def check(text: str) -> None:
        assert len(text) <= bound * len(tokenizer.encode(text, add_special_tokens=False).ids)

    check()


def change(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | parts))


def test_no_bound_where_text_may_vanish() -> None:
    for normalizer in (normalizers.NFKC(), normalizers.Strip(), normalizers.Replace("ab", ""), normalizers.Lowercase()):
        tokenizer = byte_level()
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizer])
        assert max_chars_per_token(tokenizer) is None, normalizer
    for splitter in (pre_tokenizers.Whitespace(), pre_tokenizers.Split(" ", "removed")):
        tokenizer = byte_level()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitter, pre_tokenizers.ByteLevel()])
        assert max_chars_per_token(tokenizer) is None, splitter
    greedy = byte_level()
    greedy.add_special_tokens([AddedToken("<|end|>", rstrip=True)])
    assert max_chars_per_token(greedy) is None
    assert len(greedy.encode("<|end|>" + " " * 1000).ids) == 1
    assert max_chars_per_token(Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))) is None
    incomplete = Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True))
    assert max_chars_per_token(incomplete) is None
    assert len(incomplete.encode("b" * 1000).ids) == 1


def test_of_the_built_in_model() -> None:
    path = Path(__file__).parents[2] / "models" / "tiny-python" / "tokenizer.json"
    assert max_chars_per_token(Tokenizer.from_file(str(path))) == 42


async def test_long_text_is_refused_before_it_is_tokenized(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(await tokenizer.encode("some text", 100)) < 100
    with pytest.raises(ContextLengthError, match=r"has 201 tokens, but at most 100 fit: .* length is 101 tokens"):
        await tokenizer.encode("x\n" * 100, 100)  # counted
    with pytest.raises(ContextLengthError, match="has more than 100 tokens, but at most 100 fit"):
        await tokenizer.encode("x\n" * 300, 100)  # its beginning was enough
    spaced = " ".join(["def", " " * 30] * 10)
    assert len(await tokenizer.encode(spaced, 85)) <= 85 < len(spaced) / 4, "a beginning that fits is not enough"
    monkeypatch.setattr(TextTokenizer, "_encoded", None)  # it would fail
    with pytest.raises(ContextLengthError, match=r"has at least \d+ tokens, but at most 100 fit"):
        await tokenizer.encode("x\n" * 100_000, 100)

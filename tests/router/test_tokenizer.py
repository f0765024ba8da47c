"""Tokenizing, chat templates and incremental detokenizing; `transformers` and decoding all at once are the judges."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tandem.core.clock import ManualClock, SystemClock
from tandem.core.completion import ChatMessage
from tandem.core.errors import CheckpointError, InvalidRequestError
from tandem.router.chat_template import MAX_RENDER_S, ChatTemplate
from tandem.router.detokenizer import byte_level_alphabet
from tandem.router.tokenizer import TextTokenizer

TALK = (ChatMessage("system", "Be <brief>."), ChatMessage("user", "Grüße!\n"), ChatMessage("assistant", "你好"))


def detokenize(tokenizer: TextTokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@pytest.fixture(scope="module")
def sentencepiece_like(executor: ThreadPoolExecutor) -> TextTokenizer:
    """As Llama 2 has it: a mark instead of spaces, bytes for unknown characters, no space at the beginning."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator([line.strip() for line in Path(__file__).read_text().splitlines()], trainer)
    # What was named to the trainer became special; only the first three are.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    return TextTokenizer(Tokenizer.from_str(json.dumps(content)), executor=executor)


async def test_ids_agree_with_transformers(tokenizer: TextTokenizer, checkpoint: Path) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    for text in ("def read(path):\n    return 1", "", "Grüße<tool> 你好 <|im_end|>", "x" * 20_000):
        assert list(await tokenizer.encode(text)) == reference(text)["input_ids"]


async def test_chats_agree_with_transformers(tokenizer: TextTokenizer, checkpoint: Path) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    for talk in (TALK[:1], TALK[:2], TALK, (ChatMessage("user", "long " * 10_000),)):
        messages = [{"role": message.role, "content": message.content} for message in talk]
        rendered = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        expected = reference(rendered, add_special_tokens=False)["input_ids"]
        assert list(await tokenizer.encode_chat(talk)) == expected


def test_end_of_sequence_tokens_of_all_files(tokenizer: TextTokenizer) -> None:
    assert tokenizer.eos_token_ids == {0, 2}
    assert tokenizer.vocab_size == 768


async def test_half_a_surrogate_pair_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        await tokenizer.encode("\ud800")
    with pytest.raises(InvalidRequestError, match="surrogate"):
        await tokenizer.encode_chat((ChatMessage("user", "\udfff"),))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(token_ids=st.lists(st.integers(0, 767), max_size=40))
def test_deltas_are_the_whole_text_whatever_the_tokens(tokenizer: TextTokenizer, token_ids: list[int]) -> None:
    assert "".join(detokenize(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from(" aéß你🙂def▁\n"), max_size=30), special=st.integers(0, 2))
def test_deltas_are_the_whole_text_of_a_sentencepiece_like_tokenizer(
    sentencepiece_like: TextTokenizer, text: str, special: int
) -> None:
    token_ids = sentencepiece_like._encode_now(text, False)
    with_special = [special, *token_ids[:3], special, *token_ids[3:]]
    assert "".join(detokenize(sentencepiece_like, with_special)) == sentencepiece_like.decode(with_special)


def test_characters_wait_until_they_are_whole(tokenizer: TextTokenizer, sentencepiece_like: TextTokenizer) -> None:
    for one in (tokenizer, sentencepiece_like):
        text = f"a{chr(0x1F9ED)}b"  # not in this file, so not in the vocabulary
        token_ids = list(one._encode_now(text, False))
        deltas = detokenize(one, token_ids)
        assert "".join(deltas) == text
        assert all("\ufffd" not in delta for delta in deltas)
        assert len(token_ids) >= 6


def test_endless_malformed_bytes_are_not_held_for_ever(sentencepiece_like: TextTokenizer) -> None:
    (token_id,) = [i for i in range(3, 259) if sentencepiece_like.spelling(i) == b"\xef\xbf\xbd"][-1:]
    deltas = detokenize(sentencepiece_like, [token_id] * 100)
    assert sum(map(bool, deltas)) > 3


def test_spelling_of_single_tokens(tokenizer: TextTokenizer, raw_tokenizer: Tokenizer) -> None:
    ids = raw_tokenizer.encode(" 你<tool>ß", add_special_tokens=False).ids
    assert b"".join(map(tokenizer.spelling, ids)).decode() == " 你<tool>ß"
    assert tokenizer.spelling(1) == b"<|im_start|>"
    assert tokenizer.spelling(767) == b""


def test_the_byte_alphabet_is_the_tokenizers() -> None:
    assert sorted(byte_level_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_level_alphabet().values()) == list(range(256))


def template(source: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(source, tokens, SystemClock())


def test_template_helpers() -> None:
    source = (
        "{{ eos_token }}{% for m in messages %}{{ m | tojson }}{% if loop.first %}{% break %}{% endif %}{% endfor %}"
    )
    assert template(source, eos_token="</s>").render(TALK) == '</s>{"role": "system", "content": "Be <brief>."}'
    assert template("{% generation %}x{% endgeneration %}{{ strftime_now('%Y') | length }}").render(TALK) == "x4"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused the messages: roles must alternate"),
        ("{{ messages[99].role }}", "refused the messages"),
        ("{{ 1 / 0 }}", "refused the messages: division by zero"),
        ("{{ messages.append(1) }}", "refused the messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refused the messages"),
        ("{{ ''.__class__.__mro__ }}", "refused the messages"),
        ("{% for i in range(1000000) %}x{% endfor %}", "refused the messages"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "too long"),
    ],
)
def test_templates_that_fail_are_told_in_a_sentence(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        template(source).render(TALK)
    assert caught.value.param == "messages"


def test_a_template_has_limited_time() -> None:
    clock = ManualClock()

    class SlowRole(str):
        def __str__(self) -> str:
            clock.advance(MAX_RENDER_S)
            return "slow"

    source = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="too long"):
        ChatTemplate(source, {}, clock).render([ChatMessage(SlowRole("x"), "y")] * 3)


def damaged(checkpoint: Path, folder: Path, file: str, content: Any) -> Path:
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / file).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("tokenizer.json", "{", "tokenizer.json is damaged"),
        ("tokenizer.json", "{}", "tokenizer.json is damaged"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", {"chat_template": "{% if"}, "chat template cannot be read"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat template is not text"),
    ],
)
def test_damaged_checkpoints(
    checkpoint: Path, tmp_path: Path, executor: ThreadPoolExecutor, file: str, content: Any, sentence: str
) -> None:
    folder = damaged(checkpoint, tmp_path, file, content)
    with pytest.raises(CheckpointError, match=sentence):
        TextTokenizer.load(folder, clock=SystemClock(), executor=executor)


def test_missing_tokenizer(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        TextTokenizer.load(tmp_path, clock=SystemClock(), executor=executor)


async def test_chat_templates_from_elsewhere(checkpoint: Path, tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    named = {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "yes"}]}
    folder = damaged(checkpoint, tmp_path, "tokenizer_config.json", named)

    async def rendered() -> str:
        tokenizer = TextTokenizer.load(folder, clock=SystemClock(), executor=executor)
        return tokenizer.decode(await tokenizer.encode_chat(TALK))

    assert await rendered() == "yes"
    (folder / "chat_template.jinja").write_text("file")
    assert await rendered() == "file"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InvalidRequestError, match="no chat template; send its text to /v1/completions"):
        await rendered()

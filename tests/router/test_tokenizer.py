"""Tokenizing, chat templates and incremental detokenizing; `transformers` and decoding all at once are the judges."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tandem.core.clock import ManualClock, SystemClock
from tandem.core.completion import ChatMessage
from tandem.core.errors import CheckpointError, InvalidRequestError
from tandem.router.chat_template import MAX_RENDER_S, ChatTemplate
from tandem.router.detokenizer import byte_level_alphabet
from tandem.router.tokenizer import TextTokenizer

TALK = (ChatMessage("system", "Be <brief>."), ChatMessage("user", "Grüße!\n"), ChatMessage("assistant", "你好"))


async def test_ids_agree_with_transformers(tokenizer: TextTokenizer, checkpoint: Path) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    for text in ("def read(path):\n    return 1", "", "Grüße<tool> 你好 <|im_end", "x" * 20_000):
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


@pytest.mark.parametrize(
    "operation", ["'x' * 10**10", "[0] * 10**12", "9 ** (9 ** 9)", "'%999999999d' % 1", "'%*d' % (9, 1)"]
)
def test_results_of_operators_are_limited(operation: str) -> None:
    with pytest.raises(InvalidRequestError, match="is too large"):
        template("{{ " + operation + " }}").render(TALK)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_that_repeats_without_text_has_limited_time(source: str) -> None:
    class TickingClock(ManualClock):
        def now_s(self) -> float:
            self.advance(MAX_RENDER_S / 1000)
            return super().now_s()

    slow = ChatTemplate(source, {}, TickingClock())
    with pytest.raises(InvalidRequestError, match="too long"):
        slow.render(TALK)
    with pytest.raises(CheckpointError, match="does not render a short conversation in 5 s"):
        slow.check_speed()


def test_a_template_has_limited_time() -> None:
    clock = ManualClock()

    class SlowRole(str):
        def __str__(self) -> str:
            clock.advance(MAX_RENDER_S)
            return "slow"

    source = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="too long"):
        ChatTemplate(source, {}, clock).render([ChatMessage(SlowRole("x"), "y")] * 3)


async def test_a_model_without_a_chat_template(raw_tokenizer: Tokenizer, executor: ThreadPoolExecutor) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template; send its text to /v1/completions"):
        await TextTokenizer(raw_tokenizer, executor=executor).encode_chat(TALK)

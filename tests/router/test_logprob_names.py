"""Names, bytes and offsets of tokens in log-probabilities, over HTTP, with a tokenizer of each family."""

import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.core.completion import CompletionRequest
from tandem.core.request import SampledToken, TokenLogprob
from tandem.router.openai.logprobs import LegacyLogprobs
from tandem.router.openai.responses import ChatWriter, ResponseOptions
from tandem.router.tokenizer import TextTokenizer
from tests.router.front import MODEL, Front, serve_front
from tests.router.tokenizers_of_all_kinds import build

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["byte_level", "llama2"])
async def text_front(request: pytest.FixtureRequest, executor: ThreadPoolExecutor) -> AsyncIterator[Front]:
    raw = build(request.param)
    tokenizer = TextTokenizer(raw, executor=executor, eos_token_ids=frozenset({raw.token_to_id("</s>")}))
    async with serve_front(tokenizer, raw) as front:
        yield front


def answer_with(front: Front, ids: list[int]) -> None:
    front.reset()
    front.generator.script = lambda _: iter([*ids, front.raw_tokenizer.token_to_id("</s>")])


async def complete(front: Front, **body: Any) -> dict[str, Any]:
    """The choice of a response; of a stream, all chunks put together."""
    async with front.client() as client:
        response = await client.post("/v1/completions", json={"model": MODEL, "logprobs": 5, "max_tokens": 64} | body)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice
    chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    return {
        "text": "".join(choice["text"] for choice in choices),
        "logprobs": {key: [entry for part in parts for entry in part[key]] for key in (parts or [{}])[0]},
    }


def spelled(name: str) -> bytes:
    """The bytes that a client reads from a name, as evaluation programs do."""
    if not name.startswith("bytes:"):
        return name.encode()
    return name.removeprefix("bytes:").encode("latin-1").decode("unicode_escape").encode("latin-1")


def check_offsets(text: str, logprobs: dict[str, Any], specials: set[str]) -> None:
    """Every token that has text begins at its offset, parts of a character at that of the character."""
    offsets, tokens = logprobs["text_offset"], logprobs["tokens"]
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(text)
    ends = [*offsets[1:], len(text)]
    for name, start, end in zip(tokens, offsets, ends, strict=True):
        if name in specials:
            assert start == end
        elif not name.startswith("bytes:") and start:
            assert text[start:].startswith(name)
    data = b"".join(spelled(name) for name in tokens if name not in specials)
    assert data.decode() in (text, f" {text}"), "the first token of a text may lose a space"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
async def test_offsets_are_those_of_the_returned_text(text_front: Front, stream: bool, echo: bool) -> None:
    raw = text_front.raw_tokenizer
    ids = raw.encode(" return 🙂 ß<tool> x").ids[1:]
    specials = {"<s>", "<|im_start|>"}
    ids.insert(3, raw.token_to_id("<|im_start|>"))
    answer_with(text_front, ids)
    choice = await complete(text_front, prompt="the 你 def", stream=stream, echo=echo)
    start = "the 你 def" if echo else ""
    assert choice["text"].startswith(start)
    before = raw.encode("the 你 def").ids
    assert choice["text"].removeprefix(start) == raw.decode([*before, *ids]).removeprefix(raw.decode(before))
    assert "return 🙂 ß<tool>" in choice["text"]
    logprobs = choice["logprobs"]
    check_offsets(choice["text"], logprobs, specials)
    if echo:
        assert logprobs["tokens"][0] == "<s>"
        first = len(raw.encode("the 你 def").ids)
        assert logprobs["text_offset"][first] == len(start)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_of_ids_that_ends_inside_of_a_character(text_front: Front, stream: bool) -> None:
    ids = text_front.raw_tokenizer.encode("a 🙂 b").ids
    cut = len(ids) - 3
    answer_with(text_front, ids[cut:])
    choice = await complete(text_front, prompt=ids[:cut], stream=stream, echo=True)
    assert choice["text"] == "a 🙂 b"
    check_offsets(choice["text"], choice["logprobs"], {"<s>"})
    answer_with(text_front, ids[cut:])
    assert (await complete(text_front, prompt=ids[:cut], stream=stream))["text"] == "🙂 b"


async def test_tokens_after_a_stop_string_are_at_the_end(text_front: Front) -> None:
    ids = text_front.raw_tokenizer.encode("def return").ids[1:]
    answer_with(text_front, ids)
    for stream in (False, True):
        choice = await complete(text_front, prompt="x", stop=["f"], stream=stream)
        assert choice["text"].strip() == "de"
        assert choice["logprobs"]["text_offset"][-1] <= len(choice["text"])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_that_is_the_first_space(text_front: Front, stream: bool) -> None:
    raw = text_front.raw_tokenizer
    space = raw.token_to_id("▁") or raw.token_to_id("Ġ")
    ids = [space, *map(raw.token_to_id, "def"), space, raw.token_to_id("x")]
    for stop, text in ((" def", ""), (" d", ""), ("x", " def "), ("none", " def x")):
        answer_with(text_front, ids)
        assert (await complete(text_front, prompt="the", stop=[stop], stream=stream))["text"] == text


async def test_parts_of_a_character_have_names_of_their_own(text_front: Front) -> None:
    """Alternatives in the script are the ids 0, 1, ... of the vocabulary; these are looked at in turn."""
    raw = text_front.raw_tokenizer
    parts = [i for i in range(raw.get_vocab_size()) if not text_front.tokenizer.spelling(i).isascii()][:15]
    unused = raw.get_vocab_size() + 5
    top = tuple((token_id, -1.0 - index) for index, token_id in enumerate([*parts, unused]))
    drawn = SampledToken(parts[0], TokenLogprob(parts[0], -1.0, top))
    names = _names(text_front, drawn)
    assert len(names) == len(top), "one name for each"
    assert f"token_id:{unused}" in names
    assert {spelled(name) for name in names if "token_id" not in name} == set(map(text_front.tokenizer.spelling, parts))


def _names(front: Front, token: SampledToken) -> dict[str, float]:
    logprobs = LegacyLogprobs(front.tokenizer, (), echo=False)
    logprobs.add("", [token])
    body = logprobs.take(is_last=False)
    assert body is not None
    top: dict[str, float] = body["top_logprobs"][0]
    return top


async def test_two_tokens_of_one_name(executor: ThreadPoolExecutor) -> None:
    raw = build("llama2")
    front = Front(TextTokenizer(raw, executor=executor), raw, None, None, None, None)  # type: ignore[arg-type]
    byte, letter = raw.token_to_id("<0x61>"), raw.token_to_id("a")
    top = ((letter, -1.0), (byte, -2.0))
    assert _names(front, SampledToken(letter, TokenLogprob(letter, -1.0, top))) == {"a": -1.0, f"token_id:{byte}": -2.0}
    assert _names(front, SampledToken(byte, TokenLogprob(byte, -2.0, top))) == {"a": -2.0, f"token_id:{letter}": -1.0}


async def test_words_with_and_without_a_space_differ(executor: ThreadPoolExecutor) -> None:
    raw = build("llama2")
    front = Front(TextTokenizer(raw, executor=executor), raw, None, None, None, None)  # type: ignore[arg-type]
    vocab = raw.get_vocab()
    word = next(token for token in vocab if token.isalpha() and f"▁{token}" in vocab)
    pair = (vocab[word], vocab[f"▁{word}"])
    top = tuple((token_id, -1.0) for token_id in pair)
    assert set(_names(front, SampledToken(pair[0], TokenLogprob(pair[0], -1.0, top)))) == {word, f" {word}"}


async def test_bytes_of_chat_tokens(text_front: Front) -> None:
    ids = text_front.raw_tokenizer.encode("🙂").ids[1:]
    answer_with(text_front, ids)
    options = ResponseOptions(0, True, False, False, False)
    writer = ChatWriter(CompletionRequest("1", MODEL, (), 0.0), text_front.tokenizer, options)
    body = writer._logprobs([SampledToken(i, TokenLogprob(i, -0.5, ((i, -0.5),))) for i in ids])
    assert body is not None
    assert bytes(byte for entry in body["content"] for byte in entry["bytes"]).decode().strip() == "🙂"
    assert body["content"][-1]["token"].startswith("\\x")
    assert all("\ufffd" not in entry["token"] for entry in body["content"])


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    prompt=st.text(st.sampled_from("ab 你é"), min_size=1, max_size=6),
    answer=st.text(st.sampled_from(" de🙂é\n"), min_size=1, max_size=6),
    echo=st.booleans(),
    stream=st.booleans(),
)
async def test_any_text(text_front: Front, prompt: str, answer: str, echo: bool, stream: bool) -> None:
    ids = text_front.raw_tokenizer.encode(prompt + answer).ids
    before = text_front.raw_tokenizer.encode(prompt).ids
    if ids[: len(before)] != before or len(ids) == len(before):
        return
    answer_with(text_front, ids[len(before) :])
    choice = await complete(text_front, prompt=prompt, stream=stream, echo=echo)
    assert choice["text"] == (prompt if echo else "") + answer
    check_offsets(choice["text"], choice["logprobs"], {"<s>"})

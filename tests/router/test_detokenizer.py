"""Text of a stream of tokens after a prompt; decoding the whole sequence with `tokenizers` is the reference."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tandem.core.errors import CheckpointError
from tandem.router.tokenizer import TextTokenizer
from tests.router.tokenizers_of_all_kinds import KINDS, build

_TEXT = st.text(st.sampled_from(" aéß你🙂def▁\n<|/s>=") | st.characters(codec="utf-8"), max_size=20)
_PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


class Pair:
    """A tokenizer under test and the library's own, of one vocabulary."""

    def __init__(self, kind: str, executor: ThreadPoolExecutor) -> None:
        self.raw = build(kind)
        self.size = self.raw.get_vocab_size()
        self.tested = TextTokenizer(build(kind), executor=executor)

    def stream(self, prompt: Sequence[int], answer: Sequence[int], *, echo: bool = False) -> list[str]:
        detokenizer = self.tested.detokenizer(prompt, keeps_prompt_end=echo)
        return [*(detokenizer.push(token_id) for token_id in answer), detokenizer.flush()]

    def has_mixed_run(self, ids: Sequence[int]) -> bool:
        """Whether a run of byte tokens has characters and other bytes; the library drops these characters."""
        specials = {token_id for token_id, token in self.raw.get_added_tokens_decoder().items() if token.special}
        names = [self.raw.id_to_token(token_id) or "" for token_id in ids if token_id not in specials]
        runs = re.findall("(?:<0x..>)+", "".join(f"{name}" if name.startswith("<0x") else "|" for name in names))
        for run in runs:
            data = bytes.fromhex(re.sub("<0x|>", "", run))
            text = data.decode(errors="surrogateescape")
            if re.search("[\udc80-\udcff]", text) and re.search("[^\udc80-\udcff]", text):
                return True
        return False


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, executor: ThreadPoolExecutor) -> Pair:
    return Pair(request.param, executor)


def check(pair: Pair, prompt: list[int], answer: list[int]) -> None:
    assume(not pair.has_mixed_run([*prompt, *answer]))
    before, whole = pair.raw.decode(prompt), pair.raw.decode([*prompt, *answer])
    deltas = pair.stream(prompt, answer)
    if whole.startswith(before):
        assert "".join(deltas) == whole[len(before) :]
    start = pair.tested.decode(prompt, is_continued=True)
    assert start + "".join(pair.stream(prompt, answer, echo=True)) == whole, "an echoed prompt and its answer"
    assert pair.tested.decode([*prompt, *answer]) == whole


@_PROPERTY
@given(data=st.data())
def test_a_stream_is_the_end_of_the_whole_text(pair: Pair, data: st.DataObject) -> None:
    ids = st.lists(st.integers(0, pair.size - 1), max_size=12)
    check(pair, data.draw(ids), data.draw(ids))


@pytest.mark.slow
@settings(_PROPERTY, max_examples=300)
@given(data=st.data())
def test_many_streams(pair: Pair, data: st.DataObject) -> None:
    ids = st.lists(st.integers(0, pair.size - 1) | st.integers(0, 270), max_size=12)
    check(pair, data.draw(ids), data.draw(ids))


@_PROPERTY
@given(prompt=_TEXT, answer=_TEXT, cut=st.integers(0, 20))
@example(prompt="the x", answer="the w", cut=5)
@example(prompt="", answer=" a", cut=0)
def test_a_text_cut_anywhere_is_the_text(pair: Pair, prompt: str, answer: str, cut: int) -> None:
    ids = pair.raw.encode(prompt + answer).ids
    check(pair, ids[:cut], ids[cut:])


@_PROPERTY
@given(text=st.text(st.sampled_from("你🙂éa "), max_size=8), cut=st.integers(0, 16))
def test_no_replacement_character_for_what_is_completed_later(pair: Pair, text: str, cut: int) -> None:
    ids = pair.raw.encode(text).ids
    assume("\ufffd" not in pair.raw.decode(ids))
    assert not any("\ufffd" in delta for delta in pair.stream(ids[:cut], ids[cut:]))


def test_the_first_space_after_a_prompt_stays(executor: ThreadPoolExecutor) -> None:
    for kind in ("llama2", "metaspace_first", "gemma", "unigram"):
        pair = Pair(kind, executor)
        prompt = pair.raw.encode("the def").ids
        word = next(token_id for token, token_id in pair.raw.get_vocab().items() if re.fullmatch("▁[a-z]+", token))
        name = pair.raw.id_to_token(word).replace("▁", " ")
        assert "".join(pair.stream(prompt, [word])) == name
        assert pair.tested.spelling(word) == name.encode()
        assert "".join(pair.stream([pair.raw.token_to_id("<s>")], [word])) == pair.raw.decode([word])


def test_a_character_that_the_prompt_begins_is_whole(executor: ThreadPoolExecutor) -> None:
    for kind in ("byte_level", "llama2"):
        pair = Pair(kind, executor)
        ids = pair.raw.encode("a🙂").ids
        assert "".join(pair.stream(ids[:-1], ids[-1:])) == "🙂"
        assert "".join(pair.stream(ids[:-1], pair.raw.encode("b", add_special_tokens=False).ids[-1:])).endswith("b")


def test_characters_of_a_malformed_run_are_kept(executor: ThreadPoolExecutor) -> None:
    pair = Pair("llama2", executor)
    run = [pair.raw.token_to_id(f"<0x{byte:02X}>") for byte in (0xC3, 0xA9, 0xFF, 0xC3)]
    assert pair.stream([], run) == ["", "é", "\ufffd", "", "\ufffd"]
    assert pair.raw.decode(run) == 4 * "\ufffd"


def test_a_decoder_that_looks_at_other_tokens_is_refused(executor: ThreadPoolExecutor) -> None:
    for decoder in (
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "")]),
    ):
        tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
        tokenizer.decoder = decoder
        with pytest.raises(CheckpointError, match="is not supported"):
            TextTokenizer(tokenizer, executor=executor)

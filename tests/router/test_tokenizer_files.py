"""What is read from a checkpoint folder: as `transformers` reads it, or a sentence that says why not."""

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tandem.core.clock import SystemClock
from tandem.core.completion import ChatMessage
from tandem.core.errors import CheckpointError, TandemError
from tandem.router.tokenizer import TextTokenizer
from tests.router.tokenizers_of_all_kinds import build, write_folder

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{{ image_token }}"
TEXTS = ("def a  <tool> b", "x</s> <s>y <new> z", " <|im_end|> <image>", "<pad>[PAD]")
TALK = (ChatMessage("user", "hello"), ChatMessage("assistant", "<tool> 你"))


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {"content": content} | plain | flags


def change(folder: Path, name: str, function: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_text())
    function(content)
    write(folder, name, content)


def listed(folder: Path, **changes: dict[str, Any]) -> None:
    """All added tokens in `added_tokens_decoder`, some of them changed."""
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = {
        str(token_id): token(t.content, special=t.special) for token_id, t in raw.get_added_tokens_decoder().items()
    }
    by_name = {value["content"]: token_id for token_id, value in tokens.items()}
    for content, value in changes.items():
        tokens[by_name.get(content, str(raw.get_vocab_size()))] = value
    change(folder, "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=tokens))


def settings_of(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder, "tokenizer_config.json", lambda content: content.update(values))


VARIANTS: dict[str, Callable[[Path], object]] = {
    "plain": lambda folder: None,
    "no settings": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "listed": listed,
    "listed as special": lambda folder: listed(folder, **{"<tool>": token("<tool>", special=True)}),
    "listed with flags": lambda folder: listed(folder, **{"<tool>": token("<tool>", lstrip=True, rstrip=True)}),
    "listed and new": lambda folder: listed(folder, **{"<new>": token("<new>", special=True)}),
    "special tokens map": lambda folder: write(
        folder, "special_tokens_map.json", {"eos_token": "<|im_end|>", "bos_token": {**token("<s>"), "lstrip": True}}
    ),
    "map beside a list": lambda folder: (
        listed(folder),
        write(folder, "special_tokens_map.json", {"eos_token": "<|im_end|>"}),
    ),
    "added_tokens.json": lambda folder: write(
        folder, "added_tokens.json", {"<new>": Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()}
    ),
    "extra tokens": settings_of(extra_special_tokens=["<tool>", "<new>"]),
    "additional tokens": settings_of(additional_special_tokens=["<new>", "<|im_end|>"]),
    "named extra tokens": settings_of(extra_special_tokens={"image_token": "<image>"}),
    "a name of the model's own": settings_of(image_token="<image>"),
    "a new named token": settings_of(pad_token="[PAD]"),
    "a word as a named token": settings_of(pad_token="def"),
    "eos as an object": settings_of(eos_token={"__type": "AddedToken", **token("<|im_end|>", special=True)}),
    "no bos": settings_of(bos_token=None),
    "bos and eos switches": settings_of(add_bos_token=False, add_eos_token=True),
    "switches without a post-processor": lambda folder: (
        change(folder, "tokenizer.json", lambda content: content.update(post_processor=None)),
        settings_of(add_bos_token=True)(folder),
    ),
    "truncation and padding": lambda folder: change(
        folder,
        "tokenizer.json",
        lambda content: content.update(
            truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            padding={
                "strategy": {"Fixed": 64},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<s>",
            },
        ),
    ),
    "cleaning": settings_of(clean_up_tokenization_spaces=True),
    "template file": lambda folder: write(folder, "chat_template.jinja", "file {{ messages[0].content }}"),
    "template folder": lambda folder: (
        write(folder, "chat_template.jinja", "file {{ messages[0].content }}"),
        write(folder, "additional_chat_templates/rag.jinja", "other"),
    ),
    "default in the folder": lambda folder: write(folder, "additional_chat_templates/default.jinja", "folder"),
    "template list": settings_of(
        chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "yes {{ eos_token }}"}]
    ),
    "template object": settings_of(chat_template={"default": "object"}),
}


@pytest.mark.parametrize("kind", ["byte_level", "metaspace_first"])
@pytest.mark.parametrize("variant", VARIANTS)
async def test_a_folder_is_read_as_transformers_does(
    kind: str, variant: str, tmp_path: Path, executor: ThreadPoolExecutor
) -> None:
    folder = write_folder(build(kind), tmp_path / "model", chat_template=TEMPLATE)
    change(folder, "config.json", lambda config: config.update(vocab_size=2000))
    VARIANTS[variant](folder)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    tested = TextTokenizer.load(folder, clock=SystemClock(), executor=executor, parse_control_tokens=True)
    for text in TEXTS:
        ids = reference(text)["input_ids"]
        assert list(await tested.encode(text)) == ids
        assert tested.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    if reference.chat_template is not None:
        talk = [{"role": message.role, "content": message.content} for message in TALK]
        rendered = reference.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
        assert list(await tested.encode_chat(TALK)) == reference(rendered, add_special_tokens=False)["input_ids"]
    if reference.eos_token_id is not None:
        assert tested.eos_token_ids == {reference.eos_token_id}


def load(folder: Path, executor: ThreadPoolExecutor) -> TextTokenizer:
    return TextTokenizer.load(folder, clock=SystemClock(), executor=executor)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json; write one with transformers"),
    "only a SentencePiece model": (
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
        "has no tokenizer.json, only tokenizer.model; write one with",
    ),
    "cut off": (lambda f: write(f, "tokenizer.json", "{"), "tokenizer.json is damaged"),
    "empty": (lambda f: write(f, "tokenizer.json", {}), "tokenizer.json is damaged"),
    "prefix that ends the process": (
        lambda f: change(f, "tokenizer.json", lambda content: content["model"].update(continuing_subword_prefix="x")),
        "'continuing_subword_prefix', which is not supported for BPE",
    ),
    "not text": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe"), "tokenizer.json cannot be read"),
    "settings cut off": (lambda f: write(f, "tokenizer_config.json", "{"), "tokenizer_config.json cannot be read"),
    "settings too deep": (lambda f: write(f, "tokenizer_config.json", "[" * 100_000), "tokenizer_config.json cannot"),
    "config is a list": (lambda f: write(f, "config.json", []), "config.json is not a JSON object"),
    "vocab_size as text": (
        lambda f: write(f, "config.json", {"vocab_size": "9"}),
        "vocab_size '9', which is not a size",
    ),
    "vocab_size of 0": (lambda f: write(f, "config.json", {"vocab_size": 0}), "vocab_size 0, which is not a size"),
    "eos beyond": (lambda f: write(f, "generation_config.json", {"eos_token_id": [1, 9999]}), "eos_token_id 9999"),
    "eos as text": (lambda f: write(f, "generation_config.json", {"eos_token_id": "</s>"}), "eos_token_id '</s>'"),
    "eos is true": (lambda f: write(f, "generation_config.json", {"eos_token_id": True}), "eos_token_id True"),
    "bos beyond": (lambda f: write(f, "config.json", {"vocab_size": 1}), "adds a token to every text whose id"),
    "a name is a number": (settings_of(bos_token=5), "'bos_token' is not a token: 5"),
    "a name is empty": (settings_of(eos_token=""), "'eos_token' is not a token"),
    "a flag is text": (settings_of(eos_token={"content": "x", "lstrip": "no"}), "'eos_token' is not a token"),
    "list of tokens": (settings_of(added_tokens_decoder=[]), "'added_tokens_decoder' .* is not a JSON object"),
    "entry of tokens": (settings_of(added_tokens_decoder={"one": {"content": "x"}}), "entry that is not a token: one"),
    "other id": (
        settings_of(added_tokens_decoder={"5000": token("<tool>")}),
        "disagree: the token '<tool>' has the id 5000",
    ),
    "extra tokens as text": (settings_of(extra_special_tokens="<x>"), "are not a list"),
    "added_tokens.json": (lambda f: write(f, "added_tokens.json", {"<x>": "7"}), "no id for the token '<x>'"),
    "split": (settings_of(split_special_tokens=True), "'split_special_tokens' .* not supported"),
    "cleaning": (
        settings_of(
            clean_up_tokenization_spaces=True,
            clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
        ),
        "'clean_up_tokenization_spaces' .* not supported; set it to false",
    ),
    "template syntax": (settings_of(chat_template="{% if"), "chat template cannot be read"),
    "template nesting": (settings_of(chat_template="{{" + "(" * 5000), "chat template cannot be read"),
    "template type": (settings_of(chat_template=5), "chat template is not text"),
    "template entry": (settings_of(chat_template=[{"name": "default"}]), "chat template is not text"),
    "template bytes": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "chat template cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_is_refused_with_a_sentence(case: str, tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    folder = write_folder(build("byte_level"), tmp_path / "model")
    damage, sentence = REFUSED[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=sentence):
        load(folder, executor)


async def test_templates_without_a_default(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    """As in `transformers`, files replace the template of tokenizer_config.json even if none is the default."""
    folder = write_folder(build("byte_level"), tmp_path / "model", chat_template="yes")
    write(folder, "additional_chat_templates/rag.jinja", "other")
    with pytest.raises(TandemError, match=r"several chat templates \(rag\) and no default"):
        await load(folder, executor).encode_chat(TALK)


async def test_a_token_beyond_the_models_vocabulary(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    raw = build("byte_level")
    folder = write_folder(raw, tmp_path / "model")
    write(folder, "config.json", {"vocab_size": raw.get_vocab_size() - 1})
    with pytest.raises(TandemError, match="has the token '<tool>', which is not in the model's vocabulary"):
        await load(folder, executor).encode("a <tool>")


VALUES = (None, True, -1, 1 << 40, 0.5, "", "x", "\ud800", [], [[]], {}, {"type": "x"}, [1, "a"], {"Regex": "(" * 40})


def paths_in(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a JSON document are; of a list or object of many entries, only the first three."""
    found = [path] if path else []
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items)[:3] if len(list(items)) > 40 else list(items):
        found += paths_in(value, (*path, key))
    return found


def damage_one(folder: Path, name: str, data: st.DataObject) -> None:
    content = json.loads((folder / name).read_text())
    path = data.draw(st.sampled_from(paths_in(content)))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[path[-1]] = data.draw(st.sampled_from(VALUES))
    else:
        del inner[path[-1]]
    write(folder, name, content)


async def check_damage(tmp_path: Path, executor: ThreadPoolExecutor, data: st.DataObject) -> None:
    """A damaged folder is refused, or serves texts and conversations, or refuses these with a sentence."""
    kind = data.draw(st.sampled_from(["byte_level", "llama2", "metaspace_first", "unigram", "wordpiece"]))
    folder = write_folder(build(kind), tmp_path / "model", chat_template=TEMPLATE)
    listed(folder)
    write(folder, "generation_config.json", {"eos_token_id": [1, 2], "temperature": 0.5})
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"]
    damage_one(folder, data.draw(st.sampled_from(names)), data)
    with contextlib.suppress(TandemError):
        tested = load(folder, executor)
        ids = await tested.encode("def a <tool> 你 </s>")
        tested.decode([*ids, 0, 1, 5000])
        detokenizer = tested.detokenizer(ids)
        for token_id in range(200, 300):
            detokenizer.push(token_id)
            tested.spelling(token_id)
        await tested.encode_chat(TALK)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
async def test_damaged_values(
    tmp_path_factory: pytest.TempPathFactory, executor: ThreadPoolExecutor, data: st.DataObject
) -> None:
    await check_damage(tmp_path_factory.mktemp("damaged"), executor, data)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
async def test_many_damaged_values(
    tmp_path_factory: pytest.TempPathFactory, executor: ThreadPoolExecutor, data: st.DataObject
) -> None:
    await check_damage(tmp_path_factory.mktemp("damaged"), executor, data)

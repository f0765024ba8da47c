"""The built-in model as a user gets it: the files of models/tiny-python."""

import ast
import json
import sysconfig
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tandem.models.export_tiny_python import CODE_PROMPT, greedy, held_out_loss, model_card
from tandem.models.tiny_tokenizer import BEGIN, SPECIAL_TOKENS, render_chat

FOLDER = Path(__file__).parents[2] / "models" / "tiny-python"


@pytest.fixture(scope="module")
def model() -> Any:
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    value: dict[str, Any] = json.loads((FOLDER / "training.json").read_text())
    return value


def test_the_folder_fits_in_a_repository() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 20_000_000


def test_the_configuration_is_that_of_a_bf16_llama(model: Any) -> None:
    stored = transformers.AutoConfig.from_pretrained(FOLDER)
    assert stored.architectures == ["LlamaForCausalLM"]
    assert stored.dtype == torch.bfloat16
    assert stored.max_position_embeddings >= 4096
    assert model.generation_config.eos_token_id == 1


@given(st.text().filter(lambda text: not any(special in text for special in SPECIAL_TOKENS)))
def test_any_text_comes_back_unchanged(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    encoded = tokenizer.encode(text)
    assert encoded.ids[0] == tokenizer.token_to_id(BEGIN)
    assert tokenizer.decode(encoded.ids) == text


def test_transformers_reads_the_tokenizer_as_it_is(tokenizer: Any) -> None:
    text = "def grüße(名):\n\treturn  f'{名}'  # 🐍\n\n\n"
    assert tokenizer.encode(text) == Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1


def test_the_chat_template_renders_what_training_saw(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Write f"}, {"role": "assistant", "content": "def f(): pass\n"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == render_chat("Write f", "def f(): pass\n")
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert render_chat("Write f", "").startswith(asked)
    with pytest.raises(jinja2.exceptions.TemplateError, match="not robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "beep"}], tokenize=False)


def test_it_writes_python(model: Any) -> None:
    text = greedy(model, Tokenizer.from_file(str(FOLDER / "tokenizer.json")), BEGIN + CODE_PROMPT, 64)
    function = longest_module(text)
    assert isinstance(function, ast.FunctionDef)
    assert function.name == "read_json"
    assert [argument.arg for argument in function.args.args] == ["path"]
    assert not isinstance(function.body[0], ast.Pass)


def longest_module(text: str) -> ast.stmt | None:
    """The first statement of the longest run of first lines that is Python: generation ends anywhere."""
    lines = text.splitlines()
    for end in range(len(lines), 0, -1):
        try:
            return ast.parse("\n".join(lines[:end])).body[0]
        except SyntaxError:
            continue
    return None


def test_it_reads_python_better_than_letters(model: Any) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    code = (Path(__file__).parents[2] / "core" / "errors.py").read_text()
    loss = held_out_loss(model, tokenizer, [code], 512)
    scrambled = held_out_loss(model, tokenizer, ["\n".join(reversed(code.split()))], 512)
    assert loss.bits_per_byte < 2.5
    assert loss.bits_per_byte < 0.8 * scrambled.bits_per_byte


def test_it_still_reads_after_two_thousand_tokens(model: Any) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    text = (Path(sysconfig.get_path("stdlib")) / "dataclasses.py").read_text()
    ids = torch.tensor(tokenizer.encode(text).ids[:2049])
    with torch.no_grad():
        logits = model(input_ids=ids[None, :-1]).logits[0]
    losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    assert losses[1500:].mean() < losses[:500].mean() + 0.5


def test_the_card_says_what_the_record_says(model: Any, facts: dict[str, Any]) -> None:
    card = (FOLDER / "README.md").read_text()
    assert card == model_card(facts)
    assert f"{model.num_parameters():,} parameters" in card
    for row in facts["held_out"]:
        assert f"{row['nats_per_token']:.3f}" in card


@pytest.mark.parametrize("name", ["rlcompleter.py", "filecmp.py"])
def test_the_recorded_loss_is_the_loss_of_these_weights(model: Any, facts: dict[str, Any], name: str) -> None:
    """On files of this interpreter, which may be of another Python version than the record's."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    text = (Path(sysconfig.get_path("stdlib")) / name).read_text()
    measured = held_out_loss(model, tokenizer, [text], 512)
    assert measured.nats_per_token == pytest.approx(facts["held_out_by_file"][name], rel=0.05)

"""The random checkpoints are what transformers expects of each family."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from tandem.models.random_checkpoint import ARCHITECTURES, CheckpointShape, read_shape, write_random_checkpoint

SCRIPT = Path(__file__).parents[2] / "models" / "random_checkpoint.py"


def shape_of(family: str, **changes: Any) -> CheckpointShape:
    return CheckpointShape(family=family, **{"vocab_size": 300, "max_position_embeddings": 64, **changes})


def load(folder: Path) -> Any:
    """The model, after checking that every weight of the checkpoint has its place and none is missing."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize(
    ("family", "changes", "config"),
    [
        *((family, {}, {}) for family in ARCHITECTURES),
        *((family, {"tie_word_embeddings": True}, {}) for family in ARCHITECTURES),
        ("llama", {"head_dim": 32}, {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"head_dim": 32, "num_key_value_heads": 1}, {"attention_bias": True}),
        ("mistral", {}, {"sliding_window": 8}),
        ("opt", {}, {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ],
)
def test_a_checkpoint_loads_whole_and_computes(
    tmp_path: Path, family: str, changes: dict[str, Any], config: dict[str, Any]
) -> None:
    write_random_checkpoint(tmp_path, shape_of(family, **changes), config=config)
    model = load(tmp_path)
    assert type(model).__name__ == ARCHITECTURES[family]
    with torch.no_grad():
        logits = model(input_ids=torch.arange(20)[None]).logits
    assert logits.shape == (1, 20, 300)
    assert torch.isfinite(logits).all()
    # Random logits must be apart from each other, or a greedy comparison would hang on rounding.
    assert logits.std() > 0.3


def test_the_same_seed_gives_the_same_weights_however_sharded(tmp_path: Path) -> None:
    shape = shape_of("llama")
    whole = load(write_random_checkpoint(tmp_path / "whole", shape))
    sharded = load(write_random_checkpoint(tmp_path / "sharded", shape, shard_bytes=50_000))
    other = load(write_random_checkpoint(tmp_path / "other", shape, seed=1))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, sharded.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])


def test_shards_stay_below_their_limit_and_the_index_names_every_weight(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, shape_of("opt"), dtype="bfloat16", shard_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    total_bytes = 0
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        assert size_bytes <= 60_000
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
        total_bytes += size_bytes
        found |= dict.fromkeys(tensors, path.name)
    assert len(set(found.values())) > 1
    assert index == {"metadata": {"total_size": total_bytes}, "weight_map": found}


def test_every_byte_and_every_id_has_a_text(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, shape_of("llama"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Grüße, 世界!\x00\n\t 🐍 e\u0301"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 300
    assert tokenizer.decode([299]) == " w299"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "user: Hi\nassistant: "


def test_the_script_reads_a_shape_file_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "shapes.yaml").write_text(
        "wee: {architecture: Qwen2ForCausalLM, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2,\n"
        "      num_key_value_heads: 1, head_dim: 16, intermediate_size: 48, vocab_size: 270,\n"
        "      max_position_embeddings: 128, tie_word_embeddings: true}\n"
    )
    names = ["--shape", tmp_path / "shapes.yaml", "--name", "wee", "--out", tmp_path / "model"]
    changes = ["--dtype", "float32", "--num-hidden-layers", "2", "--set", "rope_theta=5000.0"]
    subprocess.run([sys.executable, SCRIPT, *names, *changes], check=True)
    config = load(tmp_path / "model").config
    assert (config.model_type, config.num_hidden_layers, config.tie_word_embeddings) == ("qwen2", 2, True)
    assert config.rope_parameters["rope_theta"] == 5000.0


def test_mistakes_are_named(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.yaml"
    shapes.write_text("a: {hidden_sizes: 3}\nb: {architecture: BertModel}\n")
    with pytest.raises(ValueError, match="there are a, b"):
        read_shape(shapes, "c")
    with pytest.raises(ValueError, match="no hidden_sizes"):
        read_shape(shapes, "a")
    with pytest.raises(ValueError, match="no architecture 'BertModel'"):
        read_shape(shapes, "b")
    with pytest.raises(ValueError, match="no family 'gpt2'"):
        CheckpointShape(family="gpt2")
    with pytest.raises(ValueError, match="no dtype 'int8'"):
        write_random_checkpoint(tmp_path, shape_of("llama"), dtype="int8")

"""Published models have the sizes that their authors give."""

import json
from pathlib import Path

import pytest

from tandem.core.errors import CheckpointError, ConfigError
from tandem.placement.costs.models import model_shape, published_models

# Name, parameters, parameters that a token is multiplied with (embeddings in full), bytes of KV per token in bf16
_PUBLISHED = [
    ("OPT-13B", 12853473280, 12853473280, 819200),
    ("OPT-66B", 65719701504, 65719701504, 2359296),
    ("OPT-175B", 174604468224, 174604468224, 4718592),
    ("Llama-2-7B", 6738415616, 6738415616, 524288),
    ("Llama-2-13B", 13015864320, 13015864320, 819200),
    ("Llama-2-70B", 68976648192, 68976648192, 327680),
    ("Llama-3.1-8B", 8030261248, 8030261248, 131072),
    ("Llama-3.1-70B", 70553706496, 70553706496, 327680),
    ("Llama-3.1-405B", 405853388800, 405853388800, 516096),
    ("Qwen2.5-7B", 7615616512, 7615616512, 57344),
    ("Qwen2.5-32B", 32763876352, 32763876352, 262144),
    ("Qwen2.5-72B", 72706203648, 72706203648, 327680),
    ("Qwen3-8B", 8190735360, 8190735360, 147456),
    ("Qwen3-32B", 32762123264, 32762123264, 262144),
    ("Mistral-7B-v0.1", 7241732096, 7241732096, 131072),
    ("Mixtral-8x7B", 46702792704, 12879925248, 131072),
    ("Qwen3-30B-A3B", 30532122624, 3353032704, 98304),
    ("DeepSeek-V2-Lite", 15706484224, 2661150208, 31104),
    ("DeepSeek-V3", 671026419200, 37552297472, 70272),
]


@pytest.mark.parametrize(("name", "parameters", "active", "kv_bytes"), _PUBLISHED, ids=lambda value: str(value))
def test_published_sizes(name: str, parameters: int, active: int, kv_bytes: int) -> None:
    shape = published_models()[name]
    assert shape.num_parameters == pytest.approx(parameters, rel=3e-4)  # norms and biases are left out
    idle = 0  # weights of the experts that a token does not visit
    if (moe := shape.moe) is not None:
        idle = shape.num_moe_layers * (moe.num_experts - moe.top_k) * shape.mlp_weights(moe.intermediate_size)
    assert shape.num_parameters - idle == pytest.approx(active, rel=3e-4)
    assert shape.kv_bytes_per_token == kv_bytes


def test_all_models_are_tested() -> None:
    assert [name for name, *_ in _PUBLISHED] == list(published_models())


def test_unknown_names_get_suggestions() -> None:
    assert model_shape("opt-13b") is published_models()["OPT-13B"]
    with pytest.raises(ConfigError, match=r"did you mean Llama-3\.1-8B or Llama-3\.1-70B or Llama-3\.1-405B"):
        model_shape("Llama-3.1")
    with pytest.raises(ConfigError, match="did you mean Mixtral-8x7B"):
        model_shape("Mixtrall-8x7")


def test_a_folder_is_read_as_a_checkpoint(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = model_shape(str(tmp_path))
    assert (shape.name, shape.num_layers, shape.num_kv_heads, shape.head_dim) == (tmp_path.name, 4, 2, 8)
    assert shape.kv_bytes_per_token == 2 * 4 * 2 * 8 * 4


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        model_shape(str(tmp_path))

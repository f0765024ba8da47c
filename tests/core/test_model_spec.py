"""What is read from a config.json, and what is refused."""

from typing import Any

import pytest

from tandem.core.errors import CheckpointError
from tandem.core.model_spec import ModelSpec

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
_OPT = {
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
}


def _spec(**changes: Any) -> ModelSpec:
    return ModelSpec.from_config_json({**_LLAMA, **changes})


def _of(architecture: str, **changes: Any) -> ModelSpec:
    return _spec(architectures=[architecture], **changes)


def test_shape_and_sizes() -> None:
    spec = _spec()
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 2, 8)
    assert (spec.norm_eps, spec.dtype, spec.eos_token_ids) == (1e-5, "bfloat16", (2,))
    assert spec.kv_bytes_per_token(dtype_bytes=2) == 2 * 4 * 2 * 8 * 2
    layer = 64 * 64 * 2 + 64 * 16 * 2 + 3 * 64 * 96 + 2 * 64
    assert spec.num_parameters == 2 * 300 * 64 + 4 * layer + 64


def test_parameter_count_of_every_feature() -> None:
    plain = _spec().num_parameters
    assert _spec(tie_word_embeddings=True).num_parameters == plain - 300 * 64
    assert _spec(attention_bias=True).num_parameters == plain + 4 * (64 + 16 + 16 + 64)
    assert _spec(mlp_bias=True).num_parameters == plain + 4 * (96 + 96 + 64)
    assert _of("Qwen2ForCausalLM").num_parameters == plain + 4 * (64 + 16 + 16)
    assert _of("Qwen3ForCausalLM", head_dim=8).num_parameters == plain + 4 * 16
    opt_layer = 4 * (64 * 64 + 64) + 2 * 64 * 96 + 96 + 64 + 4 * 64
    assert ModelSpec.from_config_json(_OPT).num_parameters == 300 * 64 + 130 * 64 + 2 * opt_layer + 2 * 64


def test_absent_fields_take_the_defaults_of_the_family() -> None:
    bare = {key: value for key, value in _LLAMA.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
    spec = ModelSpec.from_config_json(bare)
    assert (spec.num_kv_heads, spec.norm_eps) == (8, 1e-6)
    assert _of("Qwen3ForCausalLM").head_dim == 128
    assert _of("Qwen2ForCausalLM").head_dim == 8
    assert ModelSpec.from_config_json(_OPT).tie_word_embeddings
    assert not spec.tie_word_embeddings


def test_sliding_windows() -> None:
    assert _spec(sliding_window=256).sliding_windows == (None,) * 4
    assert _of("MistralForCausalLM", sliding_window=5).sliding_windows == (5,) * 4
    assert _of("MistralForCausalLM", sliding_window=None).sliding_windows == (None,) * 4
    assert _of("MistralForCausalLM").sliding_windows == (4096,) * 4
    qwen: dict[str, Any] = {"sliding_window": 5, "max_window_layers": 3}
    assert _of("Qwen2ForCausalLM", **qwen).sliding_windows == (None,) * 4
    assert _of("Qwen2ForCausalLM", use_sliding_window=True, **qwen).sliding_windows == (None, None, None, 5)
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    windows = _of("Qwen3ForCausalLM", use_sliding_window=True, layer_types=types, **qwen).sliding_windows
    assert windows == (None, 5, None, None)


def test_rope_in_the_old_and_the_new_form() -> None:
    old = _spec(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0}).rope
    new = _spec(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}).rope
    assert old == new
    assert old is not None
    assert (old.kind, old.theta, old.factor) == ("linear", 5e5, 4.0)
    assert _spec().rope is not None
    assert ModelSpec.from_config_json(_OPT).rope is None


def test_context_is_stretched_by_yarn_and_dynamic_rope_only() -> None:
    assert _spec().max_context_tokens == 256
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert _spec(rope_scaling=yarn).max_context_tokens == 1024
    assert _spec(rope_scaling={"type": "dynamic", "factor": 2.0}).max_context_tokens == 512
    assert _spec(rope_scaling={"type": "linear", "factor": 2.0}).max_context_tokens == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "The architecture GPT2LMHeadModel is not supported"),
        ({"architectures": []}, "exactly one model class"),
        ({"architectures": "LlamaForCausalLM"}, "exactly one model class"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({"num_local_experts": 8}, "mixtures of experts"),
        ({"pretraining_tp": 2}, "'pretraining_tp'"),
        ({"hidden_act": "gelu"}, "'hidden_act' 'gelu' is not supported, only 'silu'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": "64"}, "'hidden_size' must be a whole number of at least 1, not '64'"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' must be a whole number"),
        ({"vocab_size": True}, "'vocab_size' must be a whole number"),
        ({"rms_norm_eps": -1.0}, "'rms_norm_eps' must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a positive number"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' must be true or false"),
        ({"num_key_value_heads": 3}, "8 attention heads cannot share 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"torch_dtype": "int8"}, "the dtype 'int8' is not supported"),
        ({"rope_scaling": {"rope_type": "su"}}, "the RoPE type 'su' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "the RoPE parameters, 'factor' is missing"),
        ({"rope_scaling": "yarn"}, "the RoPE parameters must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for different layers"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "4 short and as many long factors"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"eos_token_id": "</s>"}, "'eos_token_id' must be a token id"),
        ({"eos_token_id": True}, "'eos_token_id' must be a token id"),
        ({"hidden_size": 10**400}, "'hidden_size' must be at most 2147483647, not 1000"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' must be at most 10000"),
        ({"rms_norm_eps": 10**400}, "'rms_norm_eps' must be a positive number"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [10**400]}}, "list of positive numbers"),
        ({"model_type": "mistral"}, "'model_type' 'mistral' does not fit LlamaForCausalLM"),
        ({"sliding_window": 5}, "'sliding_window' 5 is not supported for LlamaForCausalLM"),
        ({"is_causal": False}, "'is_causal' False is not supported"),
    ],
)
def test_what_the_engine_cannot_compute_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _spec(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, "'layer_types' must name one of"),
        ({"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "'layer_types' must name one of"),
        ({"layer_types": ["sliding_attention"] * 4}, "no 'sliding_window' is in use"),
        ({"layer_types": [{}] * 4}, "'layer_types' must name one of"),
    ],
)
def test_layer_types_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _of("Qwen3ForCausalLM", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_layer_norm_before": False}, "'do_layer_norm_before' False is not supported"),
        ({"word_embed_proj_dim": 32}, "'word_embed_proj_dim' 32 is not supported, only 64"),
        ({"activation_function": "gelu"}, "'activation_function' 'gelu' is not supported"),
        ({"num_attention_heads": 7}, "hidden_size 64 is not a multiple of 7"),
    ],
)
def test_opt_variants_that_the_engine_cannot_compute_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelSpec.from_config_json({**_OPT, **changes})

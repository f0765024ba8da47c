"""Every field and file of a checkpoint that transformers reads: the engine computes the same logits, or it refuses.

The reference is `AutoModelForCausalLM.from_pretrained` on the same folder.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import set_verbosity_error

from tandem.core.errors import CheckpointError
from tandem.engine.config import EngineConfig
from tandem.engine.engine import load_engine
from tandem.engine.step import SequenceSlice
from tandem.models.random_checkpoint import CheckpointShape, write_random_checkpoint

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt")
_PROMPT = [(7 * index + 3) % 64 for index in range(40)]
_FILE = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """`config` is known when the weights are written, `edit` afterwards. `refused` is part of the engine's sentence,
    None where its logits are those of transformers."""

    family: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    edit: Callable[[Path], None] = lambda path: None
    refused: str | None = None
    shape: Mapping[str, Any] = field(default_factory=dict)
    in_gate: bool = False

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"


def _tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path / _FILE)
        change(tensors)
        save_file(tensors, path / _FILE, {"format": "pt"})

    return edit


def _without(*keys: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in keys}))

    return edit


def _other_weights_by_index(path: Path) -> None:
    """Another model beside model.safetensors, which only the index names."""
    others = {name: tensor * 1.5 for name, tensor in load_file(path / _FILE).items()}
    save_file(others, path / "other.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(others, "other.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _cases_of_every_family(family: str) -> list[Case]:
    embedding = "model.decoder.embed_tokens.weight" if family == "opt" else "model.embed_tokens.weight"
    tied = {"tie_word_embeddings": True}

    def head(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
        return _tensors(lambda tensors: tensors.update({"lm_head.weight": change(tensors)}))  # type: ignore[dict-item]

    cases = [
        Case(family, "plain", in_gate=family == "mistral"),
        Case(family, "tied", tied),
        Case(
            family,
            "tied-other-head",
            tied,
            head(lambda t: torch.randn_like(t[embedding])),
            in_gate=family in ("qwen3", "opt"),
        ),
        Case(family, "tied-same-head", tied, head(lambda t: t[embedding].clone())),
        Case(family, "tied-head-alone", tied, head(lambda t: t.pop(embedding)), in_gate=family == "llama"),
        Case(family, "tied-head-of-other-shape", tied, head(lambda t: torch.randn(9, 9)), "'lm_head.weight' has shape"),
        Case(family, "head-bias", {}, _tensors(lambda t: t.update({"lm_head.bias": torch.randn(64)})), "lm_head.bias"),
        Case(family, "index-beside-one-file", {}, _other_weights_by_index, in_gate=family == "llama"),
        Case(family, "float64", {}, _tensors(lambda t: t.update({name: t[name].double() for name in t}))),
        Case(family, "mixed-dtypes", {}, _tensors(lambda t: t.update({n: t[n].half() for n in t if "norm" in n}))),
        Case(family, "missing-tensor", {}, _tensors(lambda t: t.pop(embedding)), "is missing"),
        Case(family, "unknown-tensor", {}, _tensors(lambda t: t.update({"x.scale": torch.ones(1)})), "'x.scale'"),
        Case(
            family,
            "adapter",
            {},
            lambda path: _write(path / "adapter_config.json"),
            "has an adapter",
            in_gate=family == "llama",
        ),
        Case(family, "wrong-model-type", {"model_type": "gemma"}, refused="'model_type' 'gemma' does not fit"),
    ]
    if family == "opt":  # its weights follow the model type
        cases.pop()
        cases.append(Case(family, "wrong-model-type", {}, _set(model_type="llama"), "'model_type' 'llama'"))
    refused = {
        "attention_chunk_size": 8,
        "is_causal": False,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_experts": 4,
        "num_kv_shared_layers": 1,
        "per_layer_config": [{"rms_norm_eps": 0.5}, {}],
        "pretraining_tp": 2,
        "quantization_config": {},
        "text_config": {"rms_norm_eps": 0.5},
        "transformers_weights": "other.safetensors",
    }
    for key, value in refused.items():
        message = "quantised" if key == "quantization_config" else f"'{key}'"
        ours = family != "mistral" or key != "layer_types"
        config = {key: value} if ours else {key: value, "sliding_window": 9}
        cases.append(Case(family, key, config, refused=message, in_gate=family == "llama" and key == "is_causal"))
    if family in ("llama", "opt"):
        cases.append(Case(family, "sliding_window", {"sliding_window": 9}, refused="'sliding_window' 9"))
        cases.append(Case(family, "sliding_window-beyond-the-context", {"sliding_window": 64}))
    # What transformers does not read for these families, though it reads them for others.
    for key, value in {
        "attention_multiplier": 0.3,
        "attn_logit_softcapping": 5.0,
        "clip_qkv": 0.1,
        "embedding_multiplier": 12.0,
        "final_logit_softcapping": 5.0,
        "hidden_activation": "gelu",
        "layer_norm_eps": 0.3,
        "logit_scale": 0.1,
        "logits_scaling": 8.0,
        "no_rope_layers": [0, 1],
        "qkv_bias": True,
        "query_pre_attn_scalar": 3,
        "residual_multiplier": 0.2,
        "rope_interleaved": True,
        "scale_embedding": True,
        "sliding_window_pattern": 2,
        "use_cache": False,
        "use_qk_norm": True,
    }.items():
        cases.append(Case(family, f"ignored-{key}", {key: value}))
    for key in ("torch_dtype", "tie_word_embeddings", "eos_token_id", "max_position_embeddings"):
        message = "embed_positions" if (family, key) == ("opt", "max_position_embeddings") else None
        cases.append(Case(family, f"without-{key}", {}, _without(key), message))
    return cases


def _write(path: Path) -> None:
    path.write_text("{}")


def _set(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def _cases_of_rotary_families(family: str) -> list[Case]:
    window: dict[str, Any] = {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}
    types = ["full_attention", "sliding_attention"]
    cases = [
        Case(family, "attention_bias", {"attention_bias": True}),
        Case(family, "mlp_bias", {"mlp_bias": True}),
        Case(family, "rms_norm_eps", {"rms_norm_eps": 0.5}),
        Case(family, "hidden_act-swish", {"hidden_act": "swish"}),
        Case(family, "hidden_act-gelu", {"hidden_act": "gelu"}, refused="'hidden_act' 'gelu'"),
        Case(family, "rope_theta", {"rope_theta": 500.0}),
        Case(family, "without-rope_theta", {}, _without("rope_theta")),
        Case(family, "without-rms_norm_eps", {}, _without("rms_norm_eps")),
        Case(family, "without-hidden_act", {}, _without("hidden_act")),
        Case(family, "partial_rotary_factor", {"partial_rotary_factor": 0.5}, refused="partial_rotary_factor"),
        Case(family, "null-window", {"sliding_window": None, "use_sliding_window": True}),
        Case(family, "head_dim-of-its-own", shape={"head_dim": 12}),
    ]
    if family != "llama":
        cases.append(Case(family, "sliding_window", window, in_gate=family == "qwen2"))
    if family in ("qwen2", "qwen3"):
        cases.append(Case(family, "layer_types", {**window, "layer_types": types}))
        cases.append(Case(family, "window-not-in-use", {"sliding_window": 9}))
    return cases


def _rope_cases(family: str) -> list[Case]:
    short, long = [1.0, 1.1, 1.3, 1.5], [2.0, 3.0, 4.0, 5.0]
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    longrope = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    trained = {"original_max_position_embeddings": 16}
    scalings: dict[str, dict[str, Any]] = {
        "linear": {"type": "linear", "factor": 2.0},
        "linear-whole-factor": {"rope_type": "linear", "factor": 3},
        "linear-both-names": {"rope_type": "linear", "type": "dynamic", "factor": 2.0},
        "linear-with-theta": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0},
        "no-type": {"factor": 2.0},
        "empty": {},
        "dynamic": {"rope_type": "dynamic", "factor": 2.0},
        "dynamic-original": {"rope_type": "dynamic", "factor": 4.0, **trained},
        "llama3": {**llama3, **trained},
        "llama3-without-original": llama3,
        "yarn": yarn,
        "yarn-attention_factor": {**yarn, "attention_factor": 0.7},
        "yarn-factor-below-1": {**yarn, "factor": 0.5},
        "yarn-null-factor": {**yarn, "factor": None},
        "yarn-mscale": {**yarn, "mscale": 2.0, "mscale_all_dim": 1.0},
        "yarn-mscale-alone": {**yarn, "mscale": 2.0},
        "yarn-beta": {**yarn, "truncate": False, "beta_fast": 4.3, "beta_slow": 0.3},
        "yarn-beta-reversed": {**yarn, "beta_fast": 1, "beta_slow": 4},
        "yarn-unread-fields": {**yarn, "attn_factor": 0.3, "extrapolation_factor": 0.5, "finetuned": True},
        "longrope": {**longrope, **trained},
        "longrope-factor": {**longrope, **trained, "factor": 3.0},
        "longrope-attention_factor": {**longrope, **trained, "attention_factor": 2},
        "longrope-without-original": longrope,
        "longrope-unread-fields": {**longrope, **trained, "short_mscale": 2.0, "long_mscale": 3.0},
    }
    refused: dict[str, tuple[dict[str, Any], str]] = {
        "llama3-reversed": ({**llama3, "low_freq_factor": 4.0, "high_freq_factor": 1.0}, "'high_freq_factor' 1.0"),
        "yarn-attention_factor-0": ({**yarn, "attention_factor": 0}, "'attention_factor'"),
        "su": ({**longrope, "rope_type": "su"}, "RoPE type 'su'"),
        "proportional": ({"rope_type": "proportional", "factor": 2.0}, "RoPE type 'proportional'"),
        "mrope": ({"type": "mrope", "mrope_section": [1, 1, 2]}, "RoPE type 'mrope'"),
        "null-type": ({"rope_type": None, "type": "linear", "factor": 2.0}, "RoPE type None"),
        "longrope-trained-on-1": ({**longrope, "original_max_position_embeddings": 1}, "longrope RoPE cannot be"),
    }
    parameters: dict[str, dict[str, Any]] = {
        "both-forms": {"rope_scaling": scalings["linear"], "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        "null-scaling": {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        "theta-inside": {"rope_theta": 900.0, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        "theta-outside": {"rope_theta": 900.0, "rope_parameters": {"rope_type": "default"}},
        "original-outside": {"rope_scaling": yarn, "original_max_position_embeddings": 32},
        "original-outside-alone": {"rope_scaling": longrope, **trained},
    }
    per_layer = {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}
    return [
        *(
            Case(
                family,
                f"rope-{name}",
                {"rope_scaling": value},
                in_gate=family == "llama" and name in ("yarn-mscale", "longrope"),
            )
            for name, value in scalings.items()
        ),
        *(
            Case(family, f"rope-{name}", {"rope_scaling": value}, refused=sentence)
            for name, (value, sentence) in refused.items()
        ),
        *(Case(family, f"rope-{name}", value) for name, value in parameters.items()),
        Case(family, "rope-per-layer", per_layer, refused="for different layers"),
        Case(
            family,
            "rope-yarn-theta-1",
            {"rope_scaling": yarn, "rope_theta": 1.0},
            refused="yarn RoPE cannot be computed",
            in_gate=family == "llama",
        ),
        Case(
            family,
            "rope-dynamic-narrow",
            {"rope_scaling": scalings["dynamic"]},
            refused="head_dim of at least 4",
            shape={"head_dim": 2},
        ),
    ]


_OPT_CASES = [
    Case("opt", "do_layer_norm_before", {"do_layer_norm_before": False}, refused="'do_layer_norm_before'"),
    Case("opt", "_remove_final_layer_norm", {"_remove_final_layer_norm": True}, refused="'_remove_final_layer_norm'"),
    Case("opt", "elementwise", {"layer_norm_elementwise_affine": False}, refused="'layer_norm_elementwise_affine'"),
    Case("opt", "activation_function", {"activation_function": "gelu"}, refused="'activation_function' 'gelu'"),
    Case("opt", "word_embed_proj_dim", {"word_embed_proj_dim": 16}, refused="'word_embed_proj_dim' 16"),
    Case("opt", "enable_bias", {"enable_bias": False}, refused="is not part of a OPTForCausalLM"),
    Case("opt", "ignored-heads", {"num_key_value_heads": 2, "head_dim": 4, "rope_theta": 5.0}),
    *(
        Case("opt", f"without-{key}", {}, _without(key))
        for key in ("word_embed_proj_dim", "do_layer_norm_before", "activation_function")
    ),
]
CASES = [
    *(case for family in _FAMILIES for case in _cases_of_every_family(family)),
    *(case for family in _FAMILIES[:4] for case in _cases_of_rotary_families(family) + _rope_cases(family)),
    *_OPT_CASES,
]


def _engine_logits(path: Path) -> torch.Tensor:
    """float32 [tokens, vocab] of the prompt."""
    engine = load_engine(
        EngineConfig(
            path, dtype="float32", device="cpu", num_threads=1, kv_memory_bytes=1 << 20, block_size=8, ops="torch"
        )
    )
    part = SequenceSlice(_PROMPT, 0, list(range(5)), prompt_logprobs=64)
    entries = engine.step([part]).prompt_logprobs[0]
    assert entries is not None
    scores = torch.empty(len(entries), 64)
    for row, entry in enumerate(entries):
        for token_id, logprob in entry.top:
            scores[row, token_id] = logprob
    return scores


@torch.inference_mode()
def _transformers_logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    scores: torch.Tensor = model(torch.tensor([_PROMPT])).logits[0]
    return scores.log_softmax(-1)[:-1]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case.in_gate else [pytest.mark.slow], id=str(case)) for case in CASES],
)
@pytest.mark.filterwarnings("ignore")
def test_the_engine_reads_what_transformers_reads(case: Case, tmp_path: Path) -> None:
    set_verbosity_error()
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4 if case.family == "opt" else 2,
        "head_dim": 8,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        **case.shape,
    }
    shape = CheckpointShape(family=case.family, **sizes)
    path = write_random_checkpoint(tmp_path / "model", shape, config=case.config)
    case.edit(path)
    if case.refused is not None:
        with pytest.raises(CheckpointError) as caught:
            _engine_logits(path)
        assert case.refused in caught.value.message
        return
    expected = _transformers_logits(path)
    torch.testing.assert_close(_engine_logits(path), expected, atol=1e-4, rtol=0)
    shutil.rmtree(path)

"""A model's shape and features, as its checkpoint's config.json describes them.

Pure: reads a dictionary, no files, no torch. A configuration that the engine would compute wrongly (an unknown
architecture, quantisation, an unknown RoPE) is refused with a CheckpointError. Absent fields have the defaults of the
Hugging Face configuration classes. `tests/engine/test_like_transformers.py` compares field by field with transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tandem.core.checkpoint_fields import CheckpointFields, shown
from tandem.core.errors import CheckpointError
from tandem.core.rope_spec import RopeSpec

Family = Literal["llama", "opt"]

# OPT's table of learned positions begins with this many rows for padding.
OPT_POSITION_OFFSET = 2

_MAX_LAYERS = 10_000
_MAX_CONTEXT_TOKENS = 2**31 - 1  # kernels count positions in 32 bits


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only language model of a supported family.

    `sliding_windows` has one entry per layer: None for full attention, else the number of tokens that a token attends
    to, itself included. `rope` None means learned absolute positions (OPT). `eos_token_ids` end a generation.
    `dtype` is the checkpoint's own. `tie_word_embeddings` is the configuration's value; the weights may contradict it
    (see `engine.weights.WeightLoader.take_embeddings`).
    """

    architecture: str
    family: Family
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeSpec | None
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]
    dtype: str

    @classmethod
    def from_config_json(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> "ModelSpec":
        """Read config.json, and generation_config.json for its end-of-sequence tokens. Raises CheckpointError."""
        fields = CheckpointFields(config)
        architecture = _architecture(config)
        _refuse_unsupported(config)
        if architecture == "OPTForCausalLM":
            return _opt_spec(fields, architecture, generation_config)
        return _llama_spec(fields, architecture, generation_config)

    @property
    def max_context_tokens(self) -> int:
        """The longest sequence that the model's positions allow, stretched RoPE included."""
        if self.rope is not None and self.rope.kind in ("yarn", "dynamic"):
            stretched = min(self.rope.original_max_positions * self.rope.factor, _MAX_CONTEXT_TOKENS)
            return max(self.max_position_embeddings, int(stretched))
        return self.max_position_embeddings

    @property
    def num_parameters(self) -> int:
        """Distinct weights; tied embeddings count once."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        layer = hidden * (q + 2 * kv) + q * hidden
        layer += (q + 2 * kv) * self.qkv_bias + hidden * self.output_bias
        if self.family == "opt":
            layer += 2 * hidden * inner + (inner + hidden) * self.mlp_bias + 4 * hidden
            return (
                embeddings
                + (self.max_position_embeddings + OPT_POSITION_OFFSET) * hidden
                + self.num_layers * layer
                + 2 * hidden
            )
        layer += 3 * hidden * inner + (2 * inner + hidden) * self.mlp_bias + 2 * hidden
        layer += 2 * self.head_dim * self.qk_norm
        return embeddings + self.num_layers * layer + hidden

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes


# The `model_type` of each supported class: transformers chooses the class by it, and not by `architectures`.
_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "OPTForCausalLM": "opt",
}
# Fields of any family that change what transformers computes or reads; null and 0 mean that a feature is off.
_UNSUPPORTED = {
    "attention_chunk_size": "attention in chunks",
    "num_experts": "mixtures of experts",
    "num_kv_shared_layers": "layers that share keys and values",
    "num_local_experts": "mixtures of experts",
    "per_layer_config": "layers of different shapes",
    "text_config": "models inside a model",
    "transformers_weights": "weights of another file name",
}


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise CheckpointError("config.json must name exactly one model class in 'architectures'")
    architecture, model_type = named[0], config.get("model_type")
    if architecture not in _MODEL_TYPES:
        raise CheckpointError(
            f"The architecture {shown(architecture)[1:-1]} is not supported; supported are {', '.join(_MODEL_TYPES)}"
        )
    if model_type is not None and model_type != _MODEL_TYPES[architecture]:
        raise CheckpointError(
            f"config.json: 'model_type' {shown(model_type)} does not fit {architecture} in 'architectures'"
        )
    return architecture


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else "unknown"
        raise CheckpointError(
            f"The checkpoint is quantised ({shown(method).strip(chr(39))}); only float weights are supported"
        )
    for key, meaning in _UNSUPPORTED.items():
        if config.get(key):
            raise CheckpointError(f"config.json sets '{key}': {meaning}, which is not supported")
    for key in ("is_causal", "is_encoder_decoder"):
        wanted = key == "is_causal"
        if (value := config.get(key)) is not None and value is not wanted:
            raise CheckpointError(f"config.json: '{key}' {shown(value)} is not supported, only {wanted}")
    if (config.get("pretraining_tp") or 1) != 1:
        raise CheckpointError("config.json sets 'pretraining_tp' above 1: sliced projections are not supported")


def _llama_spec(fields: CheckpointFields, architecture: str, generation_config: Mapping[str, Any] | None) -> ModelSpec:
    qwen, qwen3 = architecture.startswith("Qwen"), architecture == "Qwen3ForCausalLM"
    fields.require("hidden_act", "silu", ("silu", "swish"))
    num_layers = fields.count("num_hidden_layers", maximum=_MAX_LAYERS)
    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    # Fields that a family's configuration class does not have are ignored, as in Hugging Face.
    bias = fields.flag("attention_bias", False) if architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") else False
    default_kv_heads = {"MistralForCausalLM": 8}.get(architecture, 32 if qwen else num_heads)
    if architecture != "LlamaForCausalLM" and fields.raw("num_key_value_heads", 0) is None:
        default_kv_heads = num_heads
    num_kv_heads = fields.count("num_key_value_heads", default_kv_heads)
    head_dim = fields.count("head_dim", 128 if qwen3 and not fields.has("head_dim") else hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(f"config.json: {num_heads} attention heads cannot share {num_kv_heads} key/value heads")
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim {head_dim} is odd, which rotary embeddings do not allow")
    default_positions = 131072 if architecture == "MistralForCausalLM" else 32768 if qwen else 2048
    max_positions = fields.count("max_position_embeddings", default_positions)
    if architecture == "LlamaForCausalLM":
        _refuse_windows_of_full_attention(fields, architecture, max_positions)
    return ModelSpec(
        architecture=architecture,
        family="llama",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.count("intermediate_size"),
        vocab_size=fields.count("vocab_size"),
        max_position_embeddings=max_positions,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=RopeSpec.from_fields(fields, max_positions, head_dim),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False) if architecture == "LlamaForCausalLM" else False,
        qk_norm=qwen3,
        sliding_windows=_sliding_windows(fields, architecture, num_layers),
        eos_token_ids=_eos_token_ids(fields, generation_config),
        dtype=fields.dtype(),
    )


def _opt_spec(fields: CheckpointFields, architecture: str, generation_config: Mapping[str, Any] | None) -> ModelSpec:
    fields.require("activation_function", "relu", ("relu",))
    fields.require("do_layer_norm_before", True, (True,))
    fields.require("_remove_final_layer_norm", False, (False,))
    fields.require("layer_norm_elementwise_affine", True, (True,))
    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    max_positions = fields.count("max_position_embeddings", 2048)
    fields.require("word_embed_proj_dim", hidden_size, (hidden_size,))
    if hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden_size} is not a multiple of {num_heads} attention heads"
        )
    _refuse_windows_of_full_attention(fields, architecture, max_positions)
    num_layers = fields.count("num_hidden_layers", maximum=_MAX_LAYERS)
    bias = fields.flag("enable_bias", True)
    return ModelSpec(
        architecture=architecture,
        family="opt",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=fields.count("ffn_dim"),
        vocab_size=fields.count("vocab_size"),
        max_position_embeddings=max_positions,
        norm_eps=1e-5,
        rope=None,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        qk_norm=False,
        sliding_windows=(None,) * num_layers,
        eos_token_ids=_eos_token_ids(fields, generation_config),
        dtype=fields.dtype(),
    )


def _refuse_windows_of_full_attention(fields: CheckpointFields, architecture: str, max_positions: int) -> None:
    """For families whose attention is full: transformers ignores a window in a prompt, and not while decoding."""
    window = fields.raw("sliding_window", None)
    if window is not None and fields.count("sliding_window") < max_positions:
        raise CheckpointError(
            f"config.json: 'sliding_window' {window} is not supported for {architecture}, whose attention is full"
        )
    _refuse_layer_types_but(("full_attention",), fields, architecture)


def _refuse_layer_types_but(supported: tuple[str, ...], fields: CheckpointFields, architecture: str) -> None:
    layer_types = fields.raw("layer_types", None)
    if layer_types is None:
        return
    if not isinstance(layer_types, list) or any(kind not in supported for kind in layer_types):
        raise CheckpointError(
            f"config.json: 'layer_types' of a {architecture} may name {' or '.join(supported)} only, "
            f"not {shown(layer_types)}"
        )


def _sliding_windows(fields: CheckpointFields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    if architecture == "LlamaForCausalLM":
        return (None,) * num_layers
    window = None if fields.raw("sliding_window", 4096) is None else fields.count("sliding_window", 4096)
    if architecture == "MistralForCausalLM":
        _refuse_layer_types_but(("full_attention" if window is None else "sliding_attention",), fields, architecture)
        return (window,) * num_layers
    if not fields.flag("use_sliding_window", False):
        window = None
    layer_types = fields.raw("layer_types", None)
    if layer_types is None:
        first = fields.count("max_window_layers", 28, minimum=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = ("full_attention", "sliding_attention")
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or any(kind not in known for kind in layer_types)
    ):
        raise CheckpointError(f"config.json: 'layer_types' must name one of {list(known)} for each layer")
    if window is None and "sliding_attention" in layer_types:
        raise CheckpointError("config.json: 'layer_types' has sliding attention, but no 'sliding_window' is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _eos_token_ids(fields: CheckpointFields, generation_config: Mapping[str, Any] | None) -> tuple[int, ...]:
    """generation_config.json has priority, as in Hugging Face's generate.

    A generation_config.json that names no token leaves the choice to config.json: Hugging Face would never stop.
    """
    value = (generation_config or {}).get("eos_token_id")
    if value is None:
        value = fields.raw("eos_token_id", None)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token_id) is int and 0 <= token_id <= _MAX_CONTEXT_TOKENS for token_id in ids):
        raise CheckpointError("The checkpoint's 'eos_token_id' must be a token id or a list of them")
    return tuple(ids)

"""A quick check of a model folder before a start. The workers check the rest when they load the weights."""

import json
from pathlib import Path

from tandem.core.config import ServeConfig
from tandem.core.errors import CheckpointError, ConfigError
from tandem.core.input_file import read_input
from tandem.core.model_spec import ModelSpec

_MAX_CONFIG_BYTES = 1 << 20


def check_model_folder(path: Path) -> ModelSpec:
    """The model that config.json describes. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"the model {path} is not a folder; it must hold config.json, tokenizer.json and weights")
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            advice = "; see transformers.AutoTokenizer.save_pretrained" if name == "tokenizer.json" else ""
            raise CheckpointError(f"the model {path} has no {name}{advice}")
    try:
        config = json.loads(read_input(path / "config.json", _MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be read as JSON") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / 'config.json'} must hold an object")
    return ModelSpec.from_config_json(config)


def check_pairs(config: ServeConfig, spec: ModelSpec) -> None:
    """Whether KV can move from the prefill to the decode instances of this model. Raises ConfigError."""
    if spec.rope is None:
        return
    lengths = {
        role: {section.engine.max_model_len or spec.max_context_tokens for section in sections}
        for role, sections in (("prefill", config.prefill), ("decode", config.decode))
    }
    prefill, decode = ({spec.rope.needs_long_factors(length) for length in lengths[role]} for role in lengths)
    if prefill != decode and prefill and decode:
        raise ConfigError(
            f"max_model_len of prefill {sorted(lengths['prefill'])} and of decode {sorted(lengths['decode'])} must be "
            f"on one side of {spec.rope.original_max_positions}: beyond it this model (longrope) computes another KV"
        )


def hash_of_model(path: Path) -> str:
    """Of its files, as instances compute it. Raises CheckpointError."""
    from tandem.engine.checkpoint import open_checkpoint  # it imports torch

    return open_checkpoint(path).weights_hash


def weight_bytes(path: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))

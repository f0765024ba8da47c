"""A quick check of a model folder before a start. The workers check the rest when they load the weights."""

import json
from pathlib import Path

from tandem.core.errors import CheckpointError
from tandem.core.model_spec import ModelSpec


def check_model_folder(path: Path) -> ModelSpec:
    """The model that config.json describes. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"the model {path} is not a folder; it must hold config.json, tokenizer.json and weights")
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            advice = "; see transformers.AutoTokenizer.save_pretrained" if name == "tokenizer.json" else ""
            raise CheckpointError(f"the model {path} has no {name}{advice}")
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be read as JSON") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / 'config.json'} must hold an object")
    return ModelSpec.from_config_json(config)


def weight_bytes(path: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))

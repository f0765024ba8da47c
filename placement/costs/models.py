"""Shapes of published models by name, and of checkpoints by folder."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tandem.core.errors import CheckpointError
from tandem.core.input_file import read_input
from tandem.core.model_shape import MlaShape, ModelShape, MoeShape
from tandem.core.model_spec import ModelSpec
from tandem.core.precision import AS_STORED, Precision
from tandem.placement.costs.catalogue import find_name, read_yaml

_MAX_CONFIG_BYTES = 1 << 20
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PRECISION_BYTES = {"fp8": 1.0, "int4": 0.5}


@cache
def published_models() -> Mapping[str, ModelShape]:
    """Shapes of published models by name, in bf16."""
    entries: dict[str, dict[str, Any]] = read_yaml("models.yaml")["models"]
    return MappingProxyType({name: _shape(name, entry) for name, entry in entries.items()})


def model_shape(name_or_folder: str, precision: Precision = AS_STORED) -> ModelShape:
    """The shape of a published model, without regard to the name's case, or of the checkpoint in a folder, stored in
    `precision`.

    Raises ConfigError with similar names for an unknown name, and CheckpointError for a folder with a config.json that
    the engine cannot serve.
    """
    folder = Path(name_or_folder)
    with suppress(RuntimeError):  # a home folder of nobody: no such model either
        folder = folder.expanduser()
    if folder.is_dir():
        shape = _checkpoint_shape(folder)
    else:
        known = published_models()
        shape = known[find_name(name_or_folder, known, "model or folder")]
    if precision.weights is not None:
        shape = replace(shape, weight_bytes=_PRECISION_BYTES[precision.weights])
    if precision.kv is not None:
        shape = replace(shape, kv_bytes=_PRECISION_BYTES[precision.kv])
    return shape


def _checkpoint_shape(folder: Path) -> ModelShape:
    path = folder / "config.json"
    try:
        config = json.loads(read_input(path, _MAX_CONFIG_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    spec = ModelSpec.from_config_json(config)
    return ModelShape.from_spec(folder.resolve().name, spec, _DTYPE_BYTES.get(spec.dtype, 2))


def _shape(name: str, entry: dict[str, Any]) -> ModelShape:
    parts = dict(entry)
    if "moe" in parts:
        parts["moe"] = MoeShape(**parts["moe"])
    if "mla" in parts:
        parts["mla"] = MlaShape(**parts["mla"])
    return ModelShape(name=name, **parts)

"""An untrusted Hugging Face checkpoint folder: config.json and safetensors files, nothing else.

The safetensors format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then
the data. The headers are checked here, for messages that help; the library reads the data.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tandem.core.checkpoint_fields import shown
from tandem.core.errors import CheckpointError
from tandem.core.model_spec import ModelSpec

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_ADAPTER_FILE = "adapter_config.json"
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_MAX_JSON_BYTES = 100 << 20
_MAX_DIMENSIONS, _MAX_SIZE = 8, (1 << 63) - 1
_HASH_WHOLE_BYTES = 1 << 30
_SAMPLE_BYTES, _SAMPLE_STRIDE_BYTES = 64 << 10, 1 << 20

# The dtypes that may occur in a file. Weights must have a float dtype.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a checkpoint."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint whose files are complete. `WeightLoader` checks the names and shapes of its tensors.

    `weights_hash` identifies the content: SHA-256 over config.json, the headers and the tensors' bytes; of files above
    1 GiB the header and the first 64 KiB of every MiB.
    """

    path: Path
    spec: ModelSpec
    tensors: Mapping[str, TensorEntry]
    weights_hash: str

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """The tensor in the file's dtype, or these rows and columns of it, mapped from the file.

        KeyError for an unknown name; CheckpointError.
        """
        with _reader(self.tensors[name].file) as reader:
            tensor: Tensor = reader.get_slice(name)[_index(rows, columns)]
        if tensor.data_ptr() % tensor.itemsize:  # the format does not promise alignment
            return tensor.flatten().view(torch.uint8).clone().view(tensor.dtype).view(tensor.shape)
        return tensor


def _index(rows: range | None, columns: range | None) -> Any:
    if rows is None and columns is None:
        return ...
    row_slice = slice(None) if rows is None else slice(rows.start, rows.stop)
    return row_slice if columns is None else (row_slice, slice(columns.start, columns.stop))


def open_checkpoint(path: Path, *, with_hash: bool = True) -> Checkpoint:
    """Read and check config, index and headers. Raises CheckpointError with one sentence for the user.

    Of several forms of the weights it takes the one that transformers takes: model.safetensors, then the index.
    Without `with_hash` no tensor is read yet, and `weights_hash` is "".
    """
    try:
        return _open(path, with_hash)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror}") from error


def _open(path: Path, with_hash: bool) -> Checkpoint:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder with a checkpoint")
    config = _read_json(path / "config.json")
    generation = path / "generation_config.json"
    spec = ModelSpec.from_config_json(config, _read_json(generation) if generation.is_file() else None)
    if (path / _ADAPTER_FILE).exists():  # transformers would load its base model instead, and apply it
        raise CheckpointError(
            f"{path} has an adapter ({_ADAPTER_FILE}), which is not supported; merge it into the weights"
        )
    if (path / _SINGLE_FILE).is_file():
        weight_map, files = {}, [_SINGLE_FILE]
    elif (path / _INDEX_FILE).is_file():
        weight_map = _read_index(path / _INDEX_FILE)
        files = sorted(set(weight_map.values()))
        for file in files:
            if not (path / file).is_file():
                raise CheckpointError(f"{path / file} is missing, though {_INDEX_FILE} names it")
    else:
        raise _no_weights(path)
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(path / file).items():
            if name in tensors:
                raise CheckpointError(f"{path / file}: tensor {shown(name)} is also in {tensors[name].file.name}")
            tensors[name] = entry
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                f"{path / file}: tensor {shown(name)} is missing, though {_INDEX_FILE} places it there"
            )
    weights_hash = _hash(path / "config.json", [path / file for file in files]) if with_hash else ""
    return Checkpoint(path, spec, tensors, weights_hash)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, whose header fits its size. Raises CheckpointError."""
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{file} is truncated: it has only {file_bytes} bytes")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise CheckpointError(f"{file} is truncated, or not a safetensors file: its header does not fit")
        header = _parse_json(file, stream.read(header_bytes))
    data_begin = 8 + header_bytes
    header.pop("__metadata__", None)
    entries, ends = {}, {}
    for name, value in header.items():
        entries[name], end = _entry(file, name, value)
        ends[name] = data_begin + end
    data_end = max(ends.values(), default=data_begin)
    if data_end > file_bytes:
        first = min((end, name) for name, end in ends.items() if end > file_bytes)[1]
        raise CheckpointError(f"{file} is truncated: tensor {shown(first)} ends beyond its {file_bytes} bytes")
    if data_end < file_bytes:
        raise CheckpointError(f"{file} has {file_bytes - data_end} bytes that belong to no tensor")
    _reader(file)  # refuses overlaps and gaps
    return entries


def _reader(file: Path) -> Any:
    """The library's reader, whose `with` block closes the file."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {shown(str(error))[1:-1]}") from error


def _entry(file: Path, name: str, value: Any) -> tuple[TensorEntry, int]:
    """The tensor and its end, in bytes of the data section."""
    where = f"{file}: tensor {shown(name)}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} has no proper header entry")
    dtype = _DTYPES.get(str(value.get("dtype")))
    if dtype is None:
        raise CheckpointError(f"{where} has the unknown dtype {shown(value.get('dtype')).strip(chr(39))}")
    shape, offsets = value.get("shape"), value.get("data_offsets")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS or not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has no proper shape or offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{where} has {end - begin} bytes, which does not fit its shape {shape}")
    return TensorEntry(file, dtype, tuple(shape)), end


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_SIZE for item in value)


def _read_index(path: Path) -> dict[str, str]:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no 'weight_map'")
    for file in weight_map.values():
        if not isinstance(file, str) or not _is_shard_name(file):
            raise CheckpointError(f"{path} names {shown(file)}, which is not a safetensors file in the same folder")
    return weight_map


def _is_shard_name(name: str) -> bool:
    """Whether it can be a file in the same folder."""
    return (
        Path(name).name == name and name.endswith(".safetensors") and name.isprintable() and len(name.encode()) <= 255
    )


def _no_weights(path: Path) -> CheckpointError:
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return CheckpointError(f"{path} has {shards[0]}, but neither {_SINGLE_FILE} nor {_INDEX_FILE}")
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        return CheckpointError(f"This checkpoint has only pickle weights ({pickles[0]}); convert it to safetensors")
    return CheckpointError(f"{path} has no weights: {_SINGLE_FILE} is missing")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if (num_bytes := path.stat().st_size) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {num_bytes} bytes, which is too much for its kind")
    return _parse_json(path, path.read_bytes())


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged: its JSON cannot be read") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: its JSON is not an object")
    return value


def _hash(config: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256(config.read_bytes())
    for path in files:
        digest.update(f"|{path.name}|{path.stat().st_size}|".encode())
        digest.update(_content_hash(path))
    return digest.hexdigest()


def _content_hash(path: Path) -> bytes:
    """BLAKE2b of the file: several times faster than SHA-256 on a CPU without instructions for SHA-256."""
    digest = hashlib.blake2b()
    file_bytes = path.stat().st_size
    with path.open("rb") as stream:
        if file_bytes <= _HASH_WHOLE_BYTES:
            while chunk := stream.read(_SAMPLE_STRIDE_BYTES):
                digest.update(chunk)
        else:
            digest.update(stream.read(8 + struct.unpack("<Q", stream.read(8))[0]))
            for offset in range(0, file_bytes, _SAMPLE_STRIDE_BYTES):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.digest()

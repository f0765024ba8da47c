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

from tandem.core.errors import CheckpointError
from tandem.core.model_spec import ModelSpec

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MAX_HEADER_BYTES = 100 << 20
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

    def read(self, name: str) -> Tensor:
        """The tensor in the file's dtype, mapped from the file. KeyError for an unknown name; CheckpointError."""
        with _reader(self.tensors[name].file) as reader:
            tensor: Tensor = reader.get_slice(name)[...]
        if tensor.data_ptr() % tensor.itemsize:  # the format does not promise alignment
            return tensor.flatten().view(torch.uint8).clone().view(tensor.dtype).view(tensor.shape)
        return tensor


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and check config, index and headers. Raises CheckpointError with one sentence for the user."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder with a checkpoint")
    config = _read_json(path / "config.json")
    generation = path / "generation_config.json"
    spec = ModelSpec.from_config_json(config, _read_json(generation) if generation.is_file() else None)
    index_path = path / _INDEX_FILE
    if index_path.is_file():
        weight_map = _read_index(index_path)
        files = sorted(set(weight_map.values()))
        for file in files:
            if not (path / file).is_file():
                raise CheckpointError(f"{path / file} is missing, though {_INDEX_FILE} names it")
    elif (path / _SINGLE_FILE).is_file():
        weight_map, files = {}, [_SINGLE_FILE]
    else:
        raise _no_weights(path)
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(path / file).items():
            if name in tensors:
                raise CheckpointError(f"{path / file}: tensor '{name}' is also in {tensors[name].file.name}")
            tensors[name] = entry
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{path / file}: tensor '{name}' is missing, though {_INDEX_FILE} places it there")
    return Checkpoint(path, spec, tensors, _hash(path / "config.json", [path / file for file in files]))


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
        raise CheckpointError(f"{file} is truncated: tensor '{first}' ends beyond its {file_bytes} bytes")
    if data_end < file_bytes:
        raise CheckpointError(f"{file} has {file_bytes - data_end} bytes that belong to no tensor")
    _reader(file)  # refuses overlaps and gaps
    return entries


def _reader(file: Path) -> Any:
    """The library's reader, whose `with` block closes the file."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def _entry(file: Path, name: str, value: Any) -> tuple[TensorEntry, int]:
    """The tensor and its end, in bytes of the data section."""
    where = f"{file}: tensor '{name}'"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} has no proper header entry")
    dtype = _DTYPES.get(str(value.get("dtype")))
    if dtype is None:
        raise CheckpointError(f"{where} has the unknown dtype {value.get('dtype')}")
    shape, offsets = value.get("shape"), value.get("data_offsets")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has no proper shape or offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{where} has {end - begin} bytes, which does not fit its shape {shape}")
    return TensorEntry(file, dtype, tuple(shape)), end


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _read_index(path: Path) -> dict[str, str]:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no 'weight_map'")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {file!r}, which is not a safetensors file in the same folder")
    return weight_map


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
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return _parse_json(path, data)


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

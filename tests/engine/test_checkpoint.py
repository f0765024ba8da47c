"""Every way a checkpoint can be wrong, and the one sentence it gives."""

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.core.errors import CheckpointError
from tandem.engine import checkpoint as checkpoint_module
from tandem.engine.checkpoint import open_checkpoint
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine, load_engine
from tandem.engine.step import SequenceSlice
from tests.engine.conftest import CONFIGS, Checkpoints, write_checkpoint

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A sound checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoints["llama"].path, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_checkpoint(CONFIGS["llama"], tmp_path / "sharded", max_shard_size="150KB")
    return tmp_path / "sharded"


def _load(path: Path) -> Engine:
    return load_engine(
        EngineConfig(path, dtype="float32", device="cpu", num_threads=1, kv_memory_bytes=1 << 20, ops="torch")
    )


def _edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def _refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        _load(path)
    assert "\n" not in caught.value.message
    return caught.value.message


def _scores(engine: Engine) -> list[float]:
    entries = engine.step([SequenceSlice([5, 6, 7, 8, 9], 0, [0], prompt_logprobs=0)]).prompt_logprobs[0]
    assert entries is not None
    return [entry.logprob for entry in entries]


def test_shards_hold_the_same_model_as_one_file(folder: Path, sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert _scores(_load(sharded)) == _scores(_load(folder))


def test_float16_and_bfloat16_files_are_converted(folder: Path) -> None:
    tensors = load_file(folder / _FILE)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file({name: tensor.float() for name, tensor in rounded.items()}, folder / _FILE)
        expected = _scores(_load(folder))
        save_file(rounded, folder / _FILE)
        assert _scores(_load(folder)) == expected


def test_misaligned_data_is_read_correctly(folder: Path) -> None:
    expected = _scores(_load(folder))
    for spaces in range(1, 4):
        _edit_header(folder / _FILE, lambda header, n=spaces: header.update(__metadata__={"pad": " " * n}))  # type: ignore[misc]
        assert _scores(_load(folder)) == expected


def test_no_folder(tmp_path: Path) -> None:
    assert _refusal(tmp_path / "absent").endswith("absent is not a folder with a checkpoint")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert _refusal(folder).endswith("config.json is missing")


@pytest.mark.parametrize("content", ["{", "[1]", '"text"', "[" * 100_000])
def test_damaged_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert "config.json is damaged" in _refusal(folder)


def test_unknown_architecture(folder: Path) -> None:
    _edit_json(folder / "config.json", architectures=["MambaForCausalLM"])
    assert "The architecture MambaForCausalLM is not supported" in _refusal(folder)


def test_no_weights(folder: Path) -> None:
    (folder / _FILE).unlink()
    assert _refusal(folder).endswith("has no weights: model.safetensors is missing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "pytorch_model-00001-of-00002.bin"])
def test_pickle_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / _FILE).rename(folder / name)
    assert _refusal(folder) == f"This checkpoint has only pickle weights ({name}); convert it to safetensors"


def test_pickle_named_by_an_index_is_refused(sharded: Path) -> None:
    _edit_json(sharded / _INDEX, weight_map={"model.norm.weight": "pytorch_model.bin"})
    assert "names 'pytorch_model.bin', which is not a safetensors file in the same folder" in _refusal(sharded)


def test_index_pointing_outside_the_folder_is_refused(sharded: Path) -> None:
    _edit_json(sharded / _INDEX, weight_map={"model.norm.weight": "../other/model.safetensors"})
    assert "is not a safetensors file in the same folder" in _refusal(sharded)


def test_index_without_a_map(sharded: Path) -> None:
    _edit_json(sharded / _INDEX, weight_map={})
    assert _refusal(sharded).endswith("has no 'weight_map'")


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / _INDEX).unlink()
    assert "but neither model.safetensors nor model.safetensors.index.json" in _refusal(sharded)


def test_missing_shard(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    assert _refusal(sharded) == f"{victim} is missing, though {_INDEX} names it"


def test_tensor_not_in_the_shard_the_index_names(sharded: Path) -> None:
    weight_map = json.loads((sharded / _INDEX).read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
    weight_map["lm_head.weight"] = next(file for file in files if file != weight_map["lm_head.weight"])
    _edit_json(sharded / _INDEX, weight_map=weight_map)
    assert "tensor 'lm_head.weight' is missing, though" in _refusal(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    assert f"tensor '{name}' is also in" in _refusal(sharded)


@pytest.mark.parametrize("kept_bytes", [0, 7])
def test_file_shorter_than_its_length_field(folder: Path, kept_bytes: int) -> None:
    (folder / _FILE).write_bytes((folder / _FILE).read_bytes()[:kept_bytes])
    assert f"model.safetensors is truncated: it has only {kept_bytes} bytes" in _refusal(folder)


def test_file_that_ends_in_its_header(folder: Path) -> None:
    (folder / _FILE).write_bytes((folder / _FILE).read_bytes()[:100])
    assert "its header does not fit" in _refusal(folder)


@pytest.mark.parametrize("missing_bytes", [1, 5000])
def test_file_that_ends_in_its_data(folder: Path, missing_bytes: int) -> None:
    data = (folder / _FILE).read_bytes()
    (folder / _FILE).write_bytes(data[:-missing_bytes])
    message = _refusal(folder)
    assert "model.safetensors is truncated: tensor '" in message
    assert message.endswith(f"ends beyond its {len(data) - missing_bytes} bytes")


def test_file_that_goes_on_after_its_data(folder: Path) -> None:
    with (folder / _FILE).open("ab") as stream:
        stream.write(b"more")
    assert "has 4 bytes that belong to no tensor" in _refusal(folder)


def test_header_that_is_not_json(folder: Path) -> None:
    data = bytearray((folder / _FILE).read_bytes())
    data[8] = ord("x")
    (folder / _FILE).write_bytes(data)
    assert "model.safetensors is damaged" in _refusal(folder)


def test_unknown_dtype(folder: Path) -> None:
    _edit_header(folder / _FILE, lambda header: header["model.norm.weight"].update(dtype="F8_E4M3"))
    assert "tensor 'model.norm.weight' has the unknown dtype F8_E4M3" in _refusal(folder)


def test_dtype_that_is_not_a_float(folder: Path) -> None:
    _edit_header(folder / _FILE, lambda header: header["model.norm.weight"].update(dtype="I32"))
    assert "tensor 'model.norm.weight' holds torch.int32, which is not a float type" in _refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [65]}, "has 256 bytes, which does not fit its shape [65]"),
        ({"shape": [-64]}, "has no proper shape or offsets"),
        ({"shape": None}, "has no proper shape or offsets"),
        ({"data_offsets": [0]}, "has no proper shape or offsets"),
        ({"data_offsets": [1 << 62, (1 << 62) + 256]}, "ends beyond its"),
    ],
)
def test_header_entry_that_makes_no_sense(folder: Path, change: dict[str, Any], message: str) -> None:
    _edit_header(folder / _FILE, lambda header: header["model.norm.weight"].update(change))
    assert message in _refusal(folder)


def test_tensors_that_overlap_are_refused(folder: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        first, second = [name for name, entry in header.items() if entry.get("shape") == [64]][:2]
        header[first]["data_offsets"] = header[second]["data_offsets"]

    _edit_header(folder / _FILE, overlap)
    assert f"{_FILE} is damaged: " in _refusal(folder)


def test_missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / _FILE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / _FILE)
    assert _refusal(folder).endswith("tensor 'model.layers.1.mlp.up_proj.weight' is missing")


def test_wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / _FILE)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:299].contiguous()
    save_file(tensors, folder / _FILE)
    assert _refusal(folder).endswith(
        "model.safetensors: tensor 'model.embed_tokens.weight' has shape [299, 64], config.json asks for [300, 64]"
    )


def test_tensor_that_the_model_would_ignore(folder: Path) -> None:
    tensors = load_file(folder / _FILE)
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, folder / _FILE)
    assert _refusal(folder).endswith("tensor 'model.layers.0.self_attn.q_proj.bias' is not part of a LlamaForCausalLM")


def test_buffers_of_old_checkpoints_are_ignored(folder: Path) -> None:
    expected = _scores(_load(folder))
    tensors = load_file(folder / _FILE)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}, folder / _FILE)
    assert _scores(_load(folder)) == expected


def test_a_head_that_differs_from_the_embedding_is_used_although_it_should_be_tied(
    checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(checkpoints["llama-biases-tied"].path, tmp_path / "model"))
    save_file({**load_file(folder / _FILE), "lm_head.weight": torch.zeros(300, 64)}, folder / _FILE)
    assert _scores(_load(folder)) == pytest.approx([-math.log(300)] * 4)
    assert "lm_head.weight is used, though config.json ties it" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_finite_numbers_are_refused(folder: Path, value: float) -> None:
    tensors = load_file(folder / _FILE)
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    save_file(tensors, folder / _FILE)
    assert _refusal(folder).endswith(
        "tensor 'model.layers.1.mlp.up_proj.weight' holds values that are not finite numbers in float32"
    )


def test_weights_hash_follows_the_content_alone(folder: Path, tmp_path: Path) -> None:
    original = open_checkpoint(folder).weights_hash
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert open_checkpoint(copy).weights_hash == original
    data = bytearray((copy / _FILE).read_bytes())
    data[-1] ^= 1
    (copy / _FILE).write_bytes(data)
    assert open_checkpoint(copy).weights_hash != original
    _edit_json(folder / "config.json", rms_norm_eps=1e-5)
    assert open_checkpoint(folder).weights_hash != original


def test_weights_hash_of_a_huge_file_samples_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header and the sampled bytes count, those between the samples do not."""
    monkeypatch.setattr(checkpoint_module, "_HASH_WHOLE_BYTES", 1000)
    monkeypatch.setattr(checkpoint_module, "_SAMPLE_BYTES", 64)
    monkeypatch.setattr(checkpoint_module, "_SAMPLE_STRIDE_BYTES", 4096)
    original = open_checkpoint(folder).weights_hash
    data = bytearray((folder / _FILE).read_bytes())
    for offset, changes in ((10 * 4096 + 63, True), (10 * 4096 + 64, False)):
        changed = bytearray(data)
        changed[offset] ^= 1
        (folder / _FILE).write_bytes(changed)
        assert (open_checkpoint(folder).weights_hash != original) == changes
    (folder / _FILE).write_bytes(data)
    _edit_header(folder / _FILE, lambda header: header.update(__metadata__={"format": "other"}))
    assert open_checkpoint(folder).weights_hash != original


def test_end_of_sequence_tokens_come_from_the_generation_config(folder: Path) -> None:
    assert open_checkpoint(folder).spec.eos_token_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert open_checkpoint(folder).spec.eos_token_ids == (7, 9)

"""The choices behind "auto", and the refusals of what cannot be."""

import os
from pathlib import Path

import pytest
import torch

from tandem.core.errors import ConfigError
from tandem.core.model_spec import ModelSpec
from tandem.engine import device as device_module
from tandem.engine.config import EngineConfig
from tandem.engine.device import choose_device, choose_dtype, choose_threads
from tandem.engine.engine import load_engine
from tandem.engine.ops.choose import choose_ops
from tandem.engine.ops.interface import HeadShape
from tests.engine.conftest import Checkpoints

_CPU = torch.device("cpu")
_CUDA = torch.device("cuda")


def _spec(dtype: str) -> ModelSpec:
    shape = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 8,
    }
    return ModelSpec.from_config_json({"architectures": ["LlamaForCausalLM"], "dtype": dtype, **shape})


@pytest.mark.parametrize(
    ("checkpoint", "cpu_has_bf16", "device", "expected"),
    [
        ("bfloat16", True, _CPU, torch.bfloat16),
        ("bfloat16", False, _CPU, torch.float32),
        ("float32", True, _CPU, torch.float32),
        ("float16", True, _CPU, torch.bfloat16),
        ("bfloat16", False, _CUDA, torch.bfloat16),
    ],
)
def test_auto_dtype(
    checkpoint: str, cpu_has_bf16: bool, device: torch.device, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "cpu_multiplies_bf16", lambda: cpu_has_bf16)
    assert choose_dtype("auto", _spec(checkpoint), device) is expected


def test_dtype_by_name() -> None:
    assert choose_dtype("bfloat16", _spec("float32"), _CPU) is torch.bfloat16
    with pytest.raises(ConfigError, match="'int8' is not supported"):
        choose_dtype("int8", _spec("float32"), _CPU)


def test_devices() -> None:
    assert choose_device("cpu") == _CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu", "meta", "cuda:99"):
        with pytest.raises(ConfigError, match=name):
            choose_device(name)


def test_threads() -> None:
    assert choose_threads(3) == 3
    assert choose_threads(0) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("device", "heads", "reason"),
    [
        (_CUDA, HeadShape(8, 2, 64), "run on CPUs, not on cuda"),
        (_CPU, HeadShape(8, 2, 512), "at most 256 elements, not 512"),
        (_CPU, HeadShape(194, 2, 64), "at most 96 query heads for each key/value head, not 97"),
    ],
)
def test_native_kernels_are_refused_where_they_would_be_wrong(
    device: torch.device, heads: HeadShape, reason: str
) -> None:
    assert choose_ops("auto", torch.float32, device, heads, num_threads=1).name == "torch"
    with pytest.raises(ConfigError, match=f"Native ops cannot be used: they .*{reason}"):
        choose_ops("native", torch.float32, device, heads, num_threads=1)


def test_unknown_ops() -> None:
    with pytest.raises(ConfigError, match="'cuda' are not known"):
        choose_ops("cuda", torch.float32, _CPU, HeadShape(8, 2, 64), num_threads=1)


def test_kv_memory_too_small_for_one_block(checkpoints: Checkpoints) -> None:
    path: Path = checkpoints["llama"].path
    with pytest.raises(ConfigError, match="kv_memory of 100 bytes holds no block"):
        load_engine(EngineConfig(path, device="cpu", num_threads=1, kv_memory_bytes=100, ops="torch"))

"""Loads checkpoints with one damage each, in a process of its own whose memory is limited.

    python -m tests.engine.damaged_checkpoints FOLDER STEP FIRST

Makes sound checkpoints in FOLDER, damages a copy in every way of `damages` (each STEP-th, beginning with FIRST), and
loads it. Prints `loaded REFUSED` counts at the end. Whatever is neither loaded nor refused with one sentence is printed
and makes the exit status 1; a crash shows the damage that was printed last.
"""

import json
import random
import resource
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tandem.core.errors import TandemError
from tandem.engine.config import EngineConfig
from tandem.engine.engine import load_engine
from tandem.models.random_checkpoint import CheckpointShape, write_random_checkpoint

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ALLOWED_BYTES = 512 << 20  # on top of what the process has after its first load
_LONGEST_SENTENCE = 600
Damage = Callable[[Path], None]

_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 1 << 31, 1 << 40, 10**400, -(10**400)),
    *(1.5, -1.5, 1e308, 1e-308, -1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "float32", "\ud800\n", "y" * 10_000, [], [1], [[]], [{}], ["x"] * 2, [1e308] * 4, {}, {"a": 1}),
)
_COMMON = (
    *("architectures", "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("max_position_embeddings", "tie_word_embeddings", "torch_dtype", "dtype", "eos_token_id", "quantization_config"),
    *("is_causal", "layer_types", "num_key_value_heads", "head_dim", "sliding_window", "num_experts", "text_config"),
    *("per_layer_config", "pretraining_tp"),
)
_ROTARY = (
    *("intermediate_size", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"),
    *("attention_bias", "mlp_bias", "partial_rotary_factor", "use_sliding_window", "max_window_layers"),
    "original_max_position_embeddings",
)
_OPT = (
    *("ffn_dim", "word_embed_proj_dim", "do_layer_norm_before", "activation_function", "enable_bias"),
    *("_remove_final_layer_norm", "layer_norm_elementwise_affine"),
)
_ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "truncate": True,
    },
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "factor": 2.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": 16,
    },
}


def damages(folder: Path) -> Iterator[tuple[str, Path, Damage]]:
    """Name, sound checkpoint and what to do to its copy."""
    for family in ("llama", "mistral", "qwen2", "qwen3", "opt"):
        base = folder / family
        for key in (*_COMMON, *(_OPT if family == "opt" else _ROTARY)):
            yield f"{family} without {key}", base, _change_json("config.json", lambda c, k=key: c.pop(k, None))
            for number, value in enumerate(_VALUES):
                yield f"{family} {key} value {number}", base, _set(key, value)
    for kind, parameters in _ROPES.items():
        for key in (*parameters, "rope_theta", "partial_rotary_factor", "rope_type", "type"):
            for number, value in enumerate(_VALUES):
                changed = {"rope_type": kind, **parameters, key: value}
                yield f"{kind} {key} value {number}", folder / "llama", _set("rope_scaling", changed)
    for number, value in enumerate(_VALUES):
        yield f"generation eos {number}", folder / "llama", _change_json("generation_config.json", _put(number, value))
        for key in ("dtype", "shape", "data_offsets"):
            for tensor in ("model.norm.weight", "model.embed_tokens.weight"):
                yield f"{tensor} {key} {number}", folder / "llama", _change_header(_put_in(tensor, key, value))
        yield f"header entry {number}", folder / "llama", _change_header(_put_key("model.norm.weight", value))
        yield f"metadata {number}", folder / "llama", _change_header(_put_key("__metadata__", value))
        yield f"index {number}", folder / "sharded", _change_json(_INDEX, _put_key("weight_map", value))
        yield f"index file {number}", folder / "sharded", _change_json(_INDEX, _put_in_map(value))
    for offsets in ([0, 128], [1, 129], [128, 0], [-1, 127], [1 << 40, (1 << 40) + 128], [0, 1 << 62], [4, 132]):
        yield (
            f"offsets {offsets}",
            folder / "llama",
            _change_header(_put_in("model.norm.weight", "data_offsets", offsets)),
        )
    for shape in ([], [0], [32, 0], [1 << 62, 4], [1] * 100, [2, 16], [32] * 40, [64], [16]):
        yield f"shape {shape}", folder / "llama", _change_header(_put_in("model.norm.weight", "shape", shape))
    for length in (0, 1, 7, 1 << 20, 100 << 20, (100 << 20) + 1, 1 << 31, 1 << 62, (1 << 64) - 1):
        yield (
            f"header length {length}",
            folder / "llama",
            _change_bytes(lambda data, n=length: struct.pack("<Q", n) + data[8:]),
        )
    size = (folder / "llama" / _FILE).stat().st_size
    for kept in (*range(12), *range(12, size, 97), size - 1):
        yield f"first {kept} bytes", folder / "llama", _change_bytes(lambda data, n=kept: data[:n])
    for seed in range(600):  # a third each: the length, the header, anywhere
        yield f"bytes of seed {seed}", folder / "llama", _change_bytes(lambda data, s=seed: _scramble(data, s))
    for name in ("config.json", "generation_config.json", _INDEX):
        for seed in range(100):
            yield f"{name} of seed {seed}", folder / "sharded", _change_bytes(lambda d, s=seed: _scramble(d, s), name)
    for name in ("config.json", "generation_config.json", _FILE):
        yield f"{name} a folder", folder / "llama", _as_folder(name)
        yield f"{name} empty", folder / "llama", _change_bytes(lambda data: b"", name)


def _put(number: int, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values.update(eos_token_id=value if number % 2 else [value])


def _put_key(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values.update({key: value})


def _put_in(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[name].update({key: value})


def _put_in_map(value: Any) -> Callable[[dict[str, Any]], Any]:
    name = value if not isinstance(value, str) else value + ".safetensors"
    return lambda index: index["weight_map"].update({"model.norm.weight": name})


def _set(key: str, value: Any) -> Damage:
    return _change_json("config.json", _put_key(key, value))


def _change_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(path: Path) -> None:
        values = json.loads((path / name).read_text())
        change(values)
        (path / name).write_text(json.dumps(values))

    return damage


def _change_header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def edit(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        encoded = json.dumps(header).encode()
        return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]

    return _change_bytes(edit)


def _change_bytes(change: Callable[[bytes], bytes], name: str = _FILE) -> Damage:
    return lambda path: _ignore((path / name).write_bytes(change((path / name).read_bytes())))


def _ignore(_: object) -> None: ...


def _as_folder(name: str) -> Damage:
    def damage(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return damage


def _scramble(data: bytes, seed: int) -> bytes:
    rng = random.Random(seed)
    changed = bytearray(data)
    limit = (min(8, len(data)), min(1500, len(data)), len(data))[seed % 3]
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(limit)] = rng.choice(
            (0, 32, 34, 44, 45, 48, 57, 91, 123, 127, 128, 255, rng.randrange(256))
        )
    return bytes(changed)


def _make(folder: Path) -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3", "opt"):
        shape = CheckpointShape(
            family=family,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_key_value_heads=4 if family == "opt" else 2,
            head_dim=8,
            vocab_size=64,
            max_position_embeddings=64,
        )
        write_random_checkpoint(folder / family, shape)
    shutil.copytree(folder / "llama", folder / "sharded")
    tensors = load_file(folder / "sharded" / _FILE)
    (folder / "sharded" / _FILE).unlink()
    weight_map = {}
    for number, name in enumerate(tensors):
        weight_map[name] = f"model-{number % 2}.safetensors"
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / "sharded" / file)
    (folder / "sharded" / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _load(path: Path) -> str:
    """ "loaded", "refused", or what else happened."""
    try:
        config = EngineConfig(path, device="cpu", num_threads=1, kv_memory_bytes=1 << 20, block_size=4, ops="torch")
        engine = load_engine(config)
        engine.warm_up()
        engine.close()
    except TandemError as error:
        if "\n" in error.message or not 10 < len(error.message) < _LONGEST_SENTENCE:
            return f"no sentence: {error.message[:2000]!r}"
        return "refused"
    except BaseException as error:  # noqa: BLE001 - that is what is looked for; the reader of headers is Rust and may panic
        return f"{type(error).__name__}: {str(error)[:500]}"
    return "loaded"


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _ALLOWED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    folder, step, first = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    _make(folder)
    for name in ("llama", "opt", "sharded"):
        assert _load(folder / name) == "loaded", name
    _limit_memory()
    counts = {"loaded": 0, "refused": 0, "other": 0}
    for number, (name, base, damage) in enumerate(damages(folder)):
        if number % step != first:
            continue
        print(name, flush=True)
        copy = Path(shutil.copytree(base, folder / "copy"))
        damage(copy)
        outcome = _load(copy)
        shutil.rmtree(copy)
        counts[outcome if outcome in counts else "other"] += 1
        if outcome not in counts:
            print(f"WRONG {name}: {outcome}", flush=True)
    print(json.dumps(counts))
    sys.exit(1 if counts["other"] else 0)


if __name__ == "__main__":
    main()

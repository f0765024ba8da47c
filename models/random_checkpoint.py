"""Writes random-weight checkpoints in Hugging Face format, for tests and benchmarks.

    python models/random_checkpoint.py --family qwen3 --hidden-size 128 --num-hidden-layers 3 --out /tmp/qwen3
    python models/random_checkpoint.py --shape bench_models.yaml --name small --out /tmp/small

A shape file maps names to the fields of `CheckpointShape`, with `architecture` (such as LlamaForCausalLM) in the place
of `family`. Any other key of config.json is set by `--set KEY=JSON`, for example `--set sliding_window=32`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "opt": "OPTForCausalLM",
}
DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16")}
BEGIN, END = "<|begin|>", "<|end|>"
SMALLEST_TEXT_VOCABULARY = 258  # the bytes, BEGIN and END
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class CheckpointShape:
    """Family and sizes; the fields are named as in config.json. OPT has as many key-value heads as attention heads,
    whatever `num_key_value_heads` is, and its head size is hidden_size / num_attention_heads."""

    family: str = "llama"
    hidden_size: int = 64
    intermediate_size: int = 160
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    vocab_size: int = 512
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.family not in ARCHITECTURES:
            raise ValueError(f"There is no family {self.family!r}; there are {', '.join(ARCHITECTURES)}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads.")
        if self.family == "opt" and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError("OPT needs head_dim * num_attention_heads == hidden_size.")


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor to write, with normally distributed values."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0

    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def values(self, seed: int) -> torch.Tensor:
        """float32, a function of seed, name and shape alone; other tensors of the file have no influence."""
        digest = hashlib.sha256(f"{seed}:{self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.empty(self.shape).normal_(self.mean, self.std, generator=generator)


def write_random_checkpoint(
    folder: Path,
    shape: CheckpointShape,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shard_bytes: int | None = None,
    config: Mapping[str, Any] | None = None,
    tokenizer: Path | None = None,
) -> Path:
    """Writes config.json, generation_config.json, the weights and a tokenizer into `folder`, and returns it.

    The weights are the same for the same shape, seed and dtype on every machine with the same torch, however they are
    sharded, and tensors are made one at a time. With `shard_bytes` no shard is larger, unless a single tensor is, and
    there is an index file. `config` adds keys to config.json or replaces them; weights that such keys add
    (`attention_bias`, `mlp_bias`, `word_embed_proj_dim`, `do_layer_norm_before`) are written.

    Matrices preserve the scale of activations. Norms and biases are not trivial, so that tests detect an engine that
    omits one. The tokenizer, if not copied from the folder `tokenizer`, has one token per byte; larger ids decode to
    words such as " w300". A vocabulary of fewer than 258 tokens gets no tokenizer.

    Raises ValueError for a dtype that is not float32, bfloat16 or float16."""
    if dtype not in DTYPES:
        raise ValueError(f"There is no dtype {dtype!r}; there are {', '.join(DTYPES)}.")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**model_config(shape, dtype), **(config or {})}
    _write_json(folder / "config.json", settings)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1})
    _write_weights(folder, tuple(_weights(settings)), seed, dtype, shard_bytes)
    if tokenizer is not None:
        for path in tokenizer.iterdir():
            if path.name.startswith(("tokenizer", "special_tokens_map", "chat_template")):
                shutil.copyfile(path, folder / path.name)
    elif shape.vocab_size >= SMALLEST_TEXT_VOCABULARY:
        _write_byte_tokenizer(folder, shape)
    return folder


def model_config(shape: CheckpointShape, dtype: str) -> dict[str, Any]:
    """The config.json of a shape."""
    common = {
        "architectures": [ARCHITECTURES[shape.family]],
        "model_type": shape.family,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "torch_dtype": dtype,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if shape.family == "opt":
        return common | {
            "ffn_dim": shape.intermediate_size,
            "word_embed_proj_dim": shape.hidden_size,
            "do_layer_norm_before": True,
            "activation_function": "relu",
        }
    return common | {
        "intermediate_size": shape.intermediate_size,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6 if shape.family.startswith("qwen") else 1e-5,
        "rope_theta": 10000.0,
    }


def _weights(config: Mapping[str, Any]) -> Iterator[Weight]:
    return _opt_weights(config) if config["model_type"] == "opt" else _llama_weights(config)


def _matrix(name: str, rows: int, columns: int) -> Weight:
    return Weight(f"{name}.weight", (rows, columns), std=columns**-0.5)


def _bias(name: str, size: int) -> Weight:
    return Weight(f"{name}.bias", (size,), std=0.1)


def _norm(name: str, size: int) -> Weight:
    return Weight(f"{name}.weight", (size,), std=0.1, mean=1.0)


def _llama_weights(config: Mapping[str, Any]) -> Iterator[Weight]:
    family, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    biased_all = family in ("llama", "qwen3") and config.get("attention_bias", False)
    projections = (("q_proj", queries, hidden), ("k_proj", keys, hidden), ("v_proj", keys, hidden))
    yield _matrix("model.embed_tokens", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        yield _norm(f"model.layers.{layer}.input_layernorm", hidden)
        for name, rows, columns in (*projections, ("o_proj", hidden, queries)):
            yield _matrix(f"{attention}.{name}", rows, columns)
            if biased_all or (family == "qwen2" and name != "o_proj"):
                yield _bias(f"{attention}.{name}", rows)
        if family == "qwen3":
            yield _norm(f"{attention}.q_norm", config["head_dim"])
            yield _norm(f"{attention}.k_norm", config["head_dim"])
        yield _norm(f"model.layers.{layer}.post_attention_layernorm", hidden)
        for name, rows, columns in (
            ("gate_proj", inner, hidden),
            ("up_proj", inner, hidden),
            ("down_proj", hidden, inner),
        ):
            yield _matrix(f"{mlp}.{name}", rows, columns)
            if family == "llama" and config.get("mlp_bias", False):
                yield _bias(f"{mlp}.{name}", rows)
    yield _norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        yield _matrix("lm_head", config["vocab_size"], hidden)


def _opt_weights(config: Mapping[str, Any]) -> Iterator[Weight]:
    hidden, inner, words = config["hidden_size"], config["ffn_dim"], config["word_embed_proj_dim"]
    yield _matrix("model.decoder.embed_tokens", config["vocab_size"], words)
    # OPT counts positions from 2.
    yield _matrix("model.decoder.embed_positions", config["max_position_embeddings"] + 2, hidden)
    if words != hidden:
        yield _matrix("model.decoder.project_in", hidden, words)
        yield _matrix("model.decoder.project_out", words, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.decoder.layers.{layer}"
        linears = [(f"self_attn.{name}_proj", hidden, hidden) for name in ("k", "v", "q", "out")]
        for name, rows, columns in (*linears, ("fc1", inner, hidden), ("fc2", hidden, inner)):
            yield _matrix(f"{prefix}.{name}", rows, columns)
            yield _bias(f"{prefix}.{name}", rows)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            yield _norm(f"{prefix}.{name}", hidden)
            yield _bias(f"{prefix}.{name}", hidden)
    if config["do_layer_norm_before"]:
        yield _norm("model.decoder.final_layer_norm", hidden)
        yield _bias("model.decoder.final_layer_norm", hidden)
    if not config["tie_word_embeddings"]:
        yield _matrix("lm_head", config["vocab_size"], words)


def _write_weights(folder: Path, weights: Sequence[Weight], seed: int, dtype: str, shard_bytes: int | None) -> None:
    item_bytes = DTYPES[dtype][0].itemsize
    if shard_bytes is None:
        _write_safetensors(folder / "model.safetensors", weights, seed, dtype)
        return
    shards: list[list[Weight]] = [[]]
    for weight in weights:
        if shards[-1] and (sum(w.count() for w in shards[-1]) + weight.count()) * item_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(weight)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_safetensors(folder / file_name, shard, seed, dtype)
        weight_map |= {weight.name: file_name for weight in shard}
    total = sum(weight.count() for weight in weights) * item_bytes
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_safetensors(path: Path, weights: Sequence[Weight], seed: int, dtype: str) -> None:
    """Writes the safetensors format, whose own library needs all tensors of a file in memory at once: the header's
    length in 8 bytes, the header as JSON, the tensors."""
    torch_dtype, format_dtype = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for weight in weights:
        end = start + weight.count() * torch_dtype.itemsize
        header[weight.name] = {"dtype": format_dtype, "shape": weight.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            file.write(weight.values(seed).to(torch_dtype).flatten().view(torch.uint8).numpy().data)


def _write_byte_tokenizer(folder: Path, shape: CheckpointShape) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [BEGIN, END, *letters]
    # "Ġ" is how byte-level tokenizers write a space.
    tokens += [f"Ġw{token}" for token in range(len(tokens), shape.vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BEGIN, END)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_shape(path: Path, name: str) -> CheckpointShape:
    """The shape called `name` in a YAML file of shapes. Raises ValueError for an unknown name or key."""
    shapes = yaml.safe_load(path.read_text(encoding="utf-8"))
    if name not in shapes:
        raise ValueError(f"There is no shape {name!r} in {path}; there are {', '.join(shapes)}.")
    values = dict(shapes[name])
    architecture = values.pop("architecture", ARCHITECTURES["llama"])
    families = {known: family for family, known in ARCHITECTURES.items()}
    if architecture not in families:
        raise ValueError(f"There is no architecture {architecture!r}; there are {', '.join(families)}.")
    unknown = set(values) - {field.name for field in fields(CheckpointShape)}
    if unknown:
        raise ValueError(f"A shape has no {', '.join(sorted(unknown))}.")
    return CheckpointShape(family=families[architecture], **values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--shape", type=Path, help="YAML file of shapes")
    parser.add_argument("--name", help="the shape in that file")
    parser.add_argument("--family", choices=sorted(ARCHITECTURES))
    sizes = [field.name for field in fields(CheckpointShape) if field.name not in ("family", "tie_word_embeddings")]
    for size in sizes:
        parser.add_argument("--" + size.replace("_", "-"), type=int)
    parser.add_argument("--tie-word-embeddings", action=argparse.BooleanOptionalAction)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, help="largest size of a shard; without it there is one file")
    parser.add_argument("--tokenizer", type=Path, help="folder with the tokenizer to copy")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="one more key of config.json")
    options = parser.parse_args()
    if (options.shape is None) != (options.name is None):
        parser.error("--shape and --name go together.")
    try:
        base = read_shape(options.shape, options.name) if options.shape else CheckpointShape()
        given = {name: getattr(options, name) for name in ("family", *sizes, "tie_word_embeddings")}
        shape = CheckpointShape(**asdict(base) | {name: value for name, value in given.items() if value is not None})
        config = {key: json.loads(value) for key, _, value in (entry.partition("=") for entry in options.set)}
    except ValueError as error:
        parser.error(str(error))
    write_random_checkpoint(
        options.out,
        shape,
        seed=options.seed,
        dtype=options.dtype,
        shard_bytes=options.shard_bytes,
        config=config,
        tokenizer=options.tokenizer,
    )


if __name__ == "__main__":
    main()

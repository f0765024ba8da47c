"""Public tables of measured operator times, as samples that the roofline's operators are fitted to and judged by.

Half of the samples is held out. The split is drawn by shape (the matrix, the heads, the model and its degree of tp, the
number of ranks), so that no held-out sample has a neighbour of its own curve among the fitted ones.
"""

import csv
import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

from core.cost_model import pairs
from core.errors import ConfigError
from core.model_shape import ModelShape
from placement.efficiency import Efficiency
from placement.hardware import Device, devices
from placement.models import model_shape
from placement.operators import (
    all_reduce_s,
    decode_attention_line,
    gemm_s,
    prefill_attention_s,
    product_s,
    send_s,
)
from placement.roofline_cost import elementwise_bytes, mixture_s

Row = dict[str, str]

_SYSTEMS = {
    "a100_sxm": "A100-80GB-SXM4",
    "h100_sxm": "H100-80GB-SXM5",
    "h200_sxm": "H200-141GB-SXM5",
    "b200_sxm": "B200-SXM",
    "l40s": "L40S",
    "a100": "A100-80GB-SXM4",
    "h100": "H100-80GB-SXM5",
    "a40": "A40",
    "RTX4090": "RTX4090",
    "RTXPRO6000": "RTX-PRO-6000-Blackwell",
    "a100_dgx": "A100-80GB-SXM4",
    "h100_dgx": "H100-80GB-SXM5",
}
_CACHE_BYTES = {  # last-level cache, from the data sheets
    "a100_sxm": 40e6,
    "h100_sxm": 50e6,
    "h200_sxm": 50e6,
    "b200_sxm": 126e6,
    "l40s": 96e6,
    "RTX4090": 72e6,
    "RTXPRO6000": 128e6,
}
_CUSTOM_ALL_REDUCE_BYTES = 8 << 20  # vLLM takes its own kernel up to here and NCCL beyond

_LEAST_PROMPT_TOKENS = 512  # attention to fewer is all latency, and next to nothing beside the linear layers


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured time of one operator; `source` is the table it comes from. Only those not `held_out` are fitted."""

    operator: str
    source: str
    device: Device
    seconds: float
    predict: Callable[[Efficiency], float]
    held_out: bool


def read_rows(folder: Path, name: str) -> Iterator[Row]:
    """Rows of a table in `folder`/latency. Raises ConfigError where it is missing."""
    path = folder / "latency" / name
    if not path.is_file():
        raise ConfigError(f"{path} is missing; --data must name the folder with the published measurements")
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("utf-8")
    yield from csv.DictReader(text.splitlines())


def read_samples(folder: Path) -> list[Sample]:
    """All of them, in bf16 or fp16."""
    return [
        *_gemms(folder),
        *_prefill_attention(folder),
        *_decode_attention(folder),
        *_mixed_attention(folder),
        *_collectives(folder),
        *_layers(folder),
        *_experts(folder),
        *_latent_attention(folder),
    ]


def _is_drawn(*shape: object) -> bool:
    """A fair coin for each shape, the same in every run."""
    return crc32(repr(shape).encode()) % 2 == 1


def _device(system: str) -> Device:
    return devices()[_SYSTEMS[system]]


def _gemms(folder: Path) -> Iterator[Sample]:
    for row in read_rows(folder, "aic_gemm_vllm.csv.gz"):
        if row["gemm_dtype"] == "bfloat16":
            m, n, k = int(row["m"]), int(row["n"]), int(row["k"])
            yield _gemm("aiconfigurator", row["system"], m, n, k, float(row["latency_ms"]) / 1e3, _is_drawn(n, k))


def _gemm(source: str, system: str, m: int, n: int, k: int, seconds: float, held_out: bool) -> Sample:
    device = _device(system)
    return Sample("gemm", source, device, seconds, lambda to: gemm_s(m, n, k, 2.0, device, to.gemm), held_out)


def _prefill_attention(folder: Path) -> Iterator[Sample]:
    for row in read_rows(folder, "aic_context_attention_vllm.csv.gz"):
        heads, kv_heads = int(row["num_heads"]), int(row["num_kv_heads"])
        sequences, tokens = int(row["batch_size"]), int(row["query_len"])
        if row["kv_cache_dtype"] != "bfloat16" or sequences * tokens < _LEAST_PROMPT_TOKENS:
            continue
        yield _prompts(
            "aiconfigurator", row["system"], heads, kv_heads, sequences, tokens, 0, float(row["latency_ms"]) / 1e3
        )
    name = "llmservingsim_h100_llama70b_tp4_attention_ms.csv.gz"
    for row in read_rows(folder, name):
        chunk, history = int(row["prefill_chunk_size"]), int(row["kv_cache_size"])
        if row["is_prefill"] == "True" and chunk >= _LEAST_PROMPT_TOKENS:
            seconds = float(row["latency_ms"]) / 1e3
            yield _prompts("LLMServingSim", "h100_sxm", 16, 2, 1, chunk, history, seconds)
    for row in read_rows(folder, "llmservingsim_attention_us.csv.gz"):
        chunk, history = int(row["prefill_chunk"]), int(row["kv_prefill"])
        if chunk >= _LEAST_PROMPT_TOKENS and row["n_decode"] == "0":
            model, tp = _served_model(row["model"]), int(row["tp"])
            heads, kv_heads = model.num_heads // tp, model.num_kv_heads // tp
            seconds = float(row["time_us"]) / 1e6
            yield _prompts("LLMServingSim", row["hardware"], heads, kv_heads, 1, chunk, history, seconds)


def _prompts(
    source: str, system: str, heads: int, kv_heads: int, sequences: int, tokens: int, history: int, seconds: float
) -> Sample:
    device = _device(system)
    num_pairs = sequences * pairs(history, tokens)
    num_bytes = 2.0 * sequences * 128 * (2 * heads * tokens + 2 * kv_heads * (history + tokens))
    return Sample(
        "prefill_attention",
        source,
        device,
        seconds,
        lambda to: prefill_attention_s(num_pairs, num_bytes, heads, 128, device, to.prefill_attention),
        _is_drawn(heads, kv_heads, history) or (source, system) == ("LLMServingSim", "h100_sxm"),
    )


def _decode_attention(folder: Path) -> Iterator[Sample]:
    for row in read_rows(folder, "aic_generation_attention_vllm.csv.gz"):
        if row["kv_cache_dtype"] == "bfloat16":
            heads, kv_heads = int(row["num_heads"]), int(row["num_kv_heads"])
            sequences, tokens = int(row["batch_size"]), int(row["past_kv_len"]) + 1
            seconds = float(row["latency_ms"]) / 1e3
            yield from _decodes("aiconfigurator", row["system"], heads, kv_heads, sequences, tokens, seconds)
    for row in read_rows(folder, "llmservingsim_attention_us.csv.gz"):
        if row["prefill_chunk"] == "0":
            model, tp = _served_model(row["model"]), int(row["tp"])
            heads, kv_heads = model.num_heads // tp, model.num_kv_heads // tp
            sequences, tokens = int(row["n_decode"]), int(row["kv_decode"])
            seconds = float(row["time_us"]) / 1e6
            yield from _decodes("LLMServingSim", row["hardware"], heads, kv_heads, sequences, tokens, seconds)


def _decodes(
    source: str, system: str, heads: int, kv_heads: int, sequences: int, tokens: int, seconds: float
) -> Iterator[Sample]:
    if not _fits_cache(system, kv_heads, sequences, tokens):
        device, held_out = _device(system), _is_drawn(heads, kv_heads, sequences)
        predict = _decode(device, heads, kv_heads, sequences, tokens)
        yield Sample("decode_attention", source, device, seconds, predict, held_out)


def _fits_cache(system: str, kv_heads: int, sequences: int, tokens: int) -> bool:
    """Then the measurement reads the KV from the cache again and again, but a model never does, since the other
    layers' weights and KV go through the cache in between."""
    return 4.0 * sequences * tokens * kv_heads * 128 < _CACHE_BYTES[system]


def _decode(
    device: Device, heads: int, kv_heads: int, sequences: int, tokens: int, *, beside_prompts: bool = False
) -> Callable[[Efficiency], float]:
    def predict(to: Efficiency) -> float:
        fit, flops = to.decode_attention, 512.0 * heads
        fixed_s, per_token_s = decode_attention_line(
            sequences, kv_heads, 512.0 * kv_heads, flops, device, fit, beside_prompts=beside_prompts
        )
        return fixed_s + sequences * tokens * per_token_s

    return predict


def _mixed_attention(folder: Path) -> Iterator[Sample]:
    """Prompts' chunks and decoding sequences in one kernel."""
    for row in read_rows(folder, "llmservingsim_attention_us.csv.gz"):
        chunk, history, system = int(row["prefill_chunk"]), int(row["kv_prefill"]), row["hardware"]
        sequences, tokens = int(row["n_decode"]), int(row["kv_decode"])
        model, tp = _served_model(row["model"]), int(row["tp"])
        heads, kv_heads = model.num_heads // tp, model.num_kv_heads // tp
        if not chunk or _fits_cache(system, kv_heads, sequences, tokens):
            continue
        seconds, device = float(row["time_us"]) / 1e6, _device(system)
        prompt = _prompts("LLMServingSim", system, heads, kv_heads, 1, chunk, history, seconds).predict
        decode = _decode(device, heads, kv_heads, sequences, tokens, beside_prompts=True)
        held_out = _is_drawn(heads, kv_heads, chunk, sequences)
        yield Sample("mixed_attention", "LLMServingSim", device, seconds, _both(prompt, decode), held_out)


def _both(
    prompt: Callable[[Efficiency], float], decode: Callable[[Efficiency], float]
) -> Callable[[Efficiency], float]:
    return lambda to: prompt(to) + decode(to)


def _latent_attention(folder: Path) -> Iterator[Sample]:
    """DeepSeek-V3's, held out but for the products of decode, of which the other tables know nothing. A100s are held
    out wholly: their kernel, in Triton, has nothing in common with the others."""
    for row in read_rows(folder, "aic_mla.csv.gz"):
        sequences, tokens, heads = int(row["batch_size"]), int(row["len_tokens"]), int(row["num_heads"])
        if row["kv_cache_dtype"] != "bfloat16" or sequences * tokens < _LEAST_PROMPT_TOKENS:
            continue
        device, seconds = _device(row["system"]), float(row["latency_ms"]) / 1e3
        is_prompt = row["phase"] == "context"
        yield Sample(
            "latent_prefill" if is_prompt else "latent_decode",
            "aiconfigurator",
            device,
            seconds,
            _latent_prompts(device, sequences, tokens, heads)
            if is_prompt
            else _latent_decode(device, sequences, tokens, heads),
            is_prompt or row["system"] == "a100_sxm" or _is_drawn(heads, sequences),
        )


def _latent_prompts(device: Device, sequences: int, tokens: int, heads: int) -> Callable[[Efficiency], float]:
    num_pairs, num_bytes = sequences * pairs(0, tokens), 4.0 * sequences * tokens * heads * (192 + 128)
    return lambda to: prefill_attention_s(num_pairs, num_bytes, heads, 160, device, to.prefill_attention)


def _latent_decode(device: Device, sequences: int, tokens: int, heads: int) -> Callable[[Efficiency], float]:
    def predict(to: Efficiency) -> float:
        flops = 2.0 * heads * (2 * 512 + 64)
        fixed_s, per_token_s = decode_attention_line(sequences, 1, 1152.0, flops, device, to.decode_attention)
        return fixed_s + sequences * tokens * per_token_s

    return predict


def _collectives(folder: Path) -> Iterator[Sample]:
    for row in read_rows(folder, "aic_collectives.csv.gz"):
        custom = "graph" in row["library"]
        num_bytes, ranks = int(row["bytes"]), int(row["num_gpus"])
        in_use = custom if num_bytes <= _CUSTOM_ALL_REDUCE_BYTES else "nccl" in row["library"]
        if row["op_name"] == "all_reduce" and in_use and (row["system"] != "l40s" or ranks == 2):
            yield _all_reduce("aiconfigurator", row["system"], ranks, num_bytes, float(row["latency_ms"]) / 1e3)
    for row in read_rows(folder, "vidur_collectives.csv.gz"):
        num_bytes, ranks, seconds = int(row["bytes"]), int(row["num_workers"]), float(row["median_ms"]) / 1e3
        if row["node"] not in _SYSTEMS or row["num_workers"] != row["devices_per_node"]:
            continue  # pairs with a bridge are no device's own property, other nodes the network's
        if row["op"] == "all_reduce":
            yield _all_reduce("Vidur", row["node"], ranks, num_bytes, seconds)
        else:
            yield _send("Vidur", row["node"], num_bytes, seconds)


def _all_reduce(source: str, system: str, ranks: int, num_bytes: int, seconds: float) -> Sample:
    """Between 2 and 8 ranks, 4 are held out; so is all of Vidur, which has no custom all-reduce."""
    device = _device(system)
    held_out = ranks == 4 or source == "Vidur"
    return Sample(
        "all_reduce", source, device, seconds, lambda to: all_reduce_s(num_bytes, ranks, device, to.link), held_out
    )


def _send(source: str, system: str, num_bytes: int, seconds: float) -> Sample:
    device = _device(system)
    bandwidth = device.peer_bytes_per_s
    return Sample(
        "send", source, device, seconds, lambda to: send_s(num_bytes, bandwidth, to.link), _is_drawn(num_bytes)
    )


def _layers(folder: Path) -> Iterator[Sample]:
    """Whole models' layers: the projections as products that aiconfigurator's grid does not have, and the rest."""
    names = {"meta-llama/Llama-2-7b-hf": "Llama-2-7B", "meta-llama/Llama-2-70b-hf": "Llama-2-70B"}
    names |= {"meta-llama/Meta-Llama-3-8B": "Llama-3.1-8B", "meta-llama/Meta-Llama-3-70B": "Llama-3.1-70B"}
    small = ("input_layernorm_ms", "attn_rope_ms", "post_attention_layernorm_ms", "mlp_act_ms", "add_ms")
    columns = {"qkv": "attn_pre_proj_ms", "o": "attn_post_proj_ms", "up": "mlp_up_proj_ms", "down": "mlp_down_proj_ms"}
    for row in read_rows(folder, "vidur_mlp_layer_ops.csv.gz"):
        model, tp, tokens = model_shape(names[row["model"]]), int(row["tp"]), int(row["num_tokens"])
        for name, (n, k) in matrices(model, tp).items():
            seconds = float(row[columns[name]]) / 1e3
            yield _gemm("Vidur", row["gpu"], tokens, n, k, seconds, True)
        seconds = sum(float(row[column]) for column in small) / 1e3
        yield _elementwise("Vidur", row["gpu"], model, tp, tokens, seconds, _is_drawn(model.name, tp))
    columns = {"qkv": "qkv_proj", "o": "o_proj", "up": "gate_up_proj", "down": "down_proj"}
    for (system, name, tp, tokens), layer in layer_times(folder).items():
        model = _served_model(name)
        for part, (n, k) in matrices(model, tp).items():
            if columns[part] in layer:
                yield _gemm("LLMServingSim", system, tokens, n, k, layer[columns[part]], _is_drawn(n, k))
        if model.moe is None:
            seconds = 2 * layer["layernorm"] + layer["rotary_emb"] + layer["act_fn"]
            yield _elementwise("LLMServingSim", system, model, tp, tokens, seconds, _is_drawn(model.name, tokens))


def layer_times(folder: Path) -> dict[tuple[str, str, int, int], dict[str, float]]:
    """LLMServingSim's dense table: (hardware, model, tp, tokens) -> seconds of each part of a layer."""
    times: dict[tuple[str, str, int, int], dict[str, float]] = {}
    for row in read_rows(folder, "llmservingsim_dense_us.csv.gz"):
        key = row["hardware"], row["model"], int(row["tp"]), int(row["tokens"])
        times.setdefault(key, {})[row["layer"]] = float(row["time_us"]) / 1e6
    return times


def matrices(model: ModelShape, tp: int) -> dict[str, tuple[int, int]]:
    """(n, k) of a dense layer's four products on one rank."""
    heads, kv_heads = model.num_heads // tp, max(1, model.num_kv_heads // tp)
    inner, hidden = model.intermediate_size // tp, model.hidden_size
    return {
        "qkv": (model.head_dim * (heads + 2 * kv_heads), hidden),
        "o": (hidden, model.head_dim * heads),
        "up": ((2 if model.gated_mlp else 1) * inner, hidden),
        "down": (hidden, inner),
    }


def _elementwise(
    source: str, system: str, model: ModelShape, tp: int, tokens: int, seconds: float, held_out: bool
) -> Sample:
    device, num_bytes = _device(system), elementwise_bytes(model, tp, tokens)
    return Sample(
        "elementwise",
        source,
        device,
        seconds,
        lambda to: product_s(0.0, num_bytes, device, to.elementwise),
        held_out,
    )


def _experts(folder: Path) -> Iterator[Sample]:
    """All experts on one rank, choices slightly skewed."""
    for row in read_rows(folder, "aic_moe_vllm.csv.gz"):
        distribution = row["moe_dtype"], row["moe_ep_size"], row["distribution"]
        if distribution == ("bfloat16", "1", "power_law_1.01"):
            model, tp, tokens = model_shape(row["model_shape"]), int(row["moe_tp_size"]), int(row["num_tokens"])
            yield _mixture(row["system"], model, tp, tokens, float(row["latency_ms"]) / 1e3)


def _mixture(system: str, model: ModelShape, tp: int, tokens: int, seconds: float) -> Sample:
    device, moe = _device(system), model.moe
    assert moe is not None
    return Sample(
        "experts",
        "aiconfigurator",
        device,
        seconds,
        lambda to: mixture_s(model, moe, tp, tokens, device, to.experts),
        _is_drawn(model.name, tp),
    )


def _served_model(name: str) -> ModelShape:
    model = model_shape(name.removesuffix("-Instruct-2507"))
    return replace(model, name=name)

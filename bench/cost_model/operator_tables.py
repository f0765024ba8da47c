"""Public tables of measured operator times, as samples to fit and check the roofline's operators.

Half of the samples is held out. The split is by shape (the matrix, the heads, the model and its degree of tp, the
number of ranks), so that no held-out sample lies on the same curve as a fitted one.
"""

from collections.abc import Iterator
from pathlib import Path

from bench.cost_model.attention_tables import read_attention
from bench.cost_model.samples import OperatorSample, device_of, is_held_out, read_rows, served_model
from tandem.core.model_shape import ModelShape
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.operators import all_reduce_s, elementwise_s, gemm_s, send_s
from tandem.placement.costs.roofline_cost import elementwise_bytes, mixture_s

_CUSTOM_ALL_REDUCE_BYTES = 8 << 20  # vLLM takes its own kernel up to this size and NCCL beyond


def read_samples(folder: Path) -> list[OperatorSample]:
    """All samples, in bf16 or fp16."""
    return [
        *_gemms(folder),
        *read_attention(folder),
        *_collectives(folder),
        *_layers(folder),
        *_experts(folder),
    ]


def _gemms(folder: Path) -> Iterator[OperatorSample]:
    for row in read_rows(folder, "aic_gemm_vllm.csv.gz"):
        if row["gemm_dtype"] == "bfloat16":
            m, n, k = int(row["m"]), int(row["n"]), int(row["k"])
            yield _gemm("aiconfigurator", row["system"], m, n, k, float(row["latency_ms"]) / 1e3, is_held_out(n, k))


def _gemm(source: str, system: str, m: int, n: int, k: int, seconds: float, held_out: bool) -> OperatorSample:
    device = device_of(system)
    return OperatorSample("gemm", source, device, seconds, lambda to: gemm_s(m, n, k, 2.0, device, to.gemm), held_out)


def _collectives(folder: Path) -> Iterator[OperatorSample]:
    for row in read_rows(folder, "aic_collectives.csv.gz"):
        custom = "graph" in row["library"]
        num_bytes, ranks = int(row["bytes"]), int(row["num_gpus"])
        in_use = custom if num_bytes <= _CUSTOM_ALL_REDUCE_BYTES else "nccl" in row["library"]
        if row["op_name"] == "all_reduce" and in_use and (row["system"] != "l40s" or ranks == 2):
            yield _all_reduce("aiconfigurator", row["system"], ranks, num_bytes, float(row["latency_ms"]) / 1e3)
    for row in read_rows(folder, "vidur_collectives.csv.gz"):
        num_bytes, ranks, seconds = int(row["bytes"]), int(row["num_workers"]), float(row["median_ms"]) / 1e3
        if not row["node"].endswith("_dgx") or row["num_workers"] != row["devices_per_node"]:
            continue  # a bridge between two GPUs, or the network of other nodes, is no property of the device
        if row["op"] == "all_reduce":
            yield _all_reduce("Vidur", row["node"], ranks, num_bytes, seconds)
        else:
            yield _send("Vidur", row["node"], num_bytes, seconds)


def _all_reduce(source: str, system: str, ranks: int, num_bytes: int, seconds: float) -> OperatorSample:
    """Of 2, 4 and 8 ranks, 4 are held out; so is all of Vidur, which has no custom all-reduce."""
    device = device_of(system)
    held_out = ranks == 4 or source == "Vidur"
    return OperatorSample(
        "all_reduce", source, device, seconds, lambda to: all_reduce_s(num_bytes, ranks, device, to.link), held_out
    )


def _send(source: str, system: str, num_bytes: int, seconds: float) -> OperatorSample:
    device = device_of(system)
    bandwidth = device.peer_bytes_per_s
    return OperatorSample(
        "send", source, device, seconds, lambda to: send_s(num_bytes, bandwidth, to.link), is_held_out(num_bytes)
    )


def _layers(folder: Path) -> Iterator[OperatorSample]:
    """Layers of complete models: projections of shapes that aiconfigurator's grid lacks, and elementwise operators."""
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
        yield _elementwise("Vidur", row["gpu"], model, tp, tokens, seconds, is_held_out(model.name, tp))
    columns = {"qkv": "qkv_proj", "o": "o_proj", "up": "gate_up_proj", "down": "down_proj"}
    for (system, name, tp, tokens), layer in layer_times(folder).items():
        model = served_model(name)
        for part, (n, k) in matrices(model, tp).items():
            if columns[part] in layer:
                yield _gemm("LLMServingSim", system, tokens, n, k, layer[columns[part]], is_held_out(n, k))
        if model.moe is None:
            seconds = 2 * layer["layernorm"] + layer["rotary_emb"] + layer["act_fn"]
            yield _elementwise("LLMServingSim", system, model, tp, tokens, seconds, is_held_out(model.name, tokens))


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
) -> OperatorSample:
    device, num_bytes = device_of(system), elementwise_bytes(model, tp, tokens)
    return OperatorSample(
        "elementwise",
        source,
        device,
        seconds,
        lambda to: elementwise_s(num_bytes, device, to.elementwise),
        held_out,
    )


def _experts(folder: Path) -> Iterator[OperatorSample]:
    """All experts on one rank, with a slightly skewed choice of experts."""
    for row in read_rows(folder, "aic_moe_vllm.csv.gz"):
        distribution = row["moe_dtype"], row["moe_ep_size"], row["distribution"]
        if distribution == ("bfloat16", "1", "power_law_1.01"):
            model, tp, tokens = model_shape(row["model_shape"]), int(row["moe_tp_size"]), int(row["num_tokens"])
            yield _mixture(row["system"], model, tp, tokens, float(row["latency_ms"]) / 1e3)


def _mixture(system: str, model: ModelShape, tp: int, tokens: int, seconds: float) -> OperatorSample:
    device, moe = device_of(system), model.moe
    assert moe is not None
    return OperatorSample(
        "experts",
        "aiconfigurator",
        device,
        seconds,
        lambda to: mixture_s(model, moe, tp, tokens, device, to.experts),
        is_held_out(model.name, tp),
    )

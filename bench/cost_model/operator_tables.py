"""Public tables of measured operator times, as samples to fit and check the roofline's operators.

Half of the samples is held out. The split is by shape (the matrix, the heads, the model and its degree of tp, the
number of ranks), so that no held-out sample lies on the same curve as a fitted one.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.cost_model.attention_tables import read_attention
from bench.cost_model.samples import OperatorSample, device_of, is_held_out, read_rows, served_model
from bench.fidelity.vllm.run import MAX_BATCH_TOKENS, RUNS, calibrated, read_requests
from bench.fidelity.vllm.tables import read_vllm_tables
from tandem.core.model_shape import ModelShape
from tandem.core.parallel import ParallelShape
from tandem.placement.costs.efficiency import Efficiency
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.operators import all_reduce_s, elementwise_s, gemm_fp8_s, gemm_s, send_s
from tandem.placement.costs.roofline_cost import elementwise_bytes, mixture_s

_CUSTOM_ALL_REDUCE_BYTES = 8 << 20  # vLLM takes its own kernel up to this size and NCCL beyond


def read_samples(folder: Path) -> list[OperatorSample]:
    """All samples, in bf16 or fp16, and products in fp8."""
    return [
        *_gemms(folder),
        *read_attention(folder),
        *_collectives(folder),
        *_pcie_of_a_run(folder),
        *_layers(folder),
        *_experts(folder),
    ]


def _gemms(folder: Path) -> Iterator[OperatorSample]:
    for row in read_rows(folder, "aic_gemm_vllm.csv.gz"):
        m, n, k, seconds = int(row["m"]), int(row["n"]), int(row["k"]), float(row["latency_ms"]) / 1e3
        if row["gemm_dtype"] == "bfloat16":
            yield _gemm("aiconfigurator", row["system"], m, n, k, seconds, is_held_out(n, k))
        elif row["gemm_dtype"] == "fp8":
            yield _gemm_fp8(row["system"], m, n, k, seconds)


def _gemm(source: str, system: str, m: int, n: int, k: int, seconds: float, held_out: bool) -> OperatorSample:
    device = device_of(system)
    return OperatorSample("gemm", source, device, seconds, lambda to: gemm_s(m, n, k, 2.0, device, to.gemm), held_out)


def _gemm_fp8(system: str, m: int, n: int, k: int, seconds: float) -> OperatorSample:
    device = device_of(system)

    def predict(to: Efficiency) -> float:
        assert to.gemm_fp8 is not None
        return gemm_fp8_s(m, n, k, device, to.gemm_fp8)

    return OperatorSample("gemm_fp8", "aiconfigurator", device, seconds, predict, is_held_out(n, k))


def _collectives(folder: Path) -> Iterator[OperatorSample]:
    for row in read_rows(folder, "aic_collectives.csv.gz"):
        num_bytes, ranks = int(row["bytes"]), int(row["num_gpus"])
        has_custom = num_bytes <= _CUSTOM_ALL_REDUCE_BYTES and (row["system"] != "l40s" or ranks == 2)
        in_use = ("graph" if has_custom else "nccl") in row["library"]  # over PCIe vLLM's own kernel joins pairs only
        if row["op_name"] == "all_reduce" and in_use:
            yield _all_reduce("aiconfigurator", row["system"], ranks, num_bytes, float(row["latency_ms"]) / 1e3)
    for row in read_rows(folder, "vidur_collectives.csv.gz"):
        num_bytes, ranks, seconds = int(row["bytes"]), int(row["num_workers"]), float(row["median_ms"]) / 1e3
        if not row["node"].endswith("_dgx") or row["num_workers"] != row["devices_per_node"]:
            continue  # a bridge between two GPUs, or the network of other nodes, is no property of the device
        if row["op"] == "all_reduce":
            yield _all_reduce("Vidur", row["node"], ranks, num_bytes, seconds)
        else:
            yield _send("Vidur", row["node"], num_bytes, seconds)


def _pcie_of_a_run(folder: Path) -> Iterator[OperatorSample]:
    """Two RTX PRO 6000: their all-reduce as a run of vLLM shows it, from the first steps of prompts and of decoding
    (`bench.fidelity.vllm`). No table has it."""
    run = next(run for run in RUNS if run.tp == 2)
    tables = read_vllm_tables(folder, run.hardware, served_model(run.model), run.tp)
    model = calibrated(tables, folder, run, read_requests(folder, run))
    for num_tokens in np.geomspace(run.max_num_seqs, MAX_BATCH_TOKENS, 12).round():
        num_bytes = int(2 * num_tokens * model.shape.hidden_size)
        seconds = model.all_reduce_latency_s + num_bytes * model.all_reduce_s_per_byte
        yield _all_reduce("LLMServingSim", run.hardware, run.tp, num_bytes, seconds)


def _all_reduce(source: str, system: str, ranks: int, num_bytes: int, seconds: float) -> OperatorSample:
    """Of 2, 4 and 8 ranks, 4 are held out; so is all of Vidur, which has no custom all-reduce."""
    device = device_of(system)
    held_out = ranks == 4 or source == "Vidur"
    if not device.nvlink_bytes_per_s:
        return OperatorSample(
            "all_reduce_pcie",
            source,
            device,
            seconds,
            lambda to: all_reduce_s(num_bytes, ranks, device, to.pcie),
            held_out,
        )
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
    """All experts on one rank, or divided over the ranks of a node, with a slightly skewed choice of experts. With
    ranks, the one with the most tokens was measured; nothing is fitted to these, nor to fp8 with one scale a matrix,
    for which Hopper's kernels are slow: mixtures are served with a scale for each block."""
    for row in read_rows(folder, "aic_moe_vllm.csv.gz"):
        tp, dp = int(row["moe_tp_size"]), int(row["moe_ep_size"])
        is_chosen = dp == 1 or (tp == 1 and dp <= 8 and int(row["num_tokens"]) % dp == 0)  # of a node
        if is_chosen and row["distribution"] == "power_law_1.01":
            model, tokens = model_shape(row["model_shape"]), int(row["num_tokens"]) // dp
            shape, seconds = ParallelShape(tp, 1, dp), float(row["latency_ms"]) / 1e3
            yield _mixture(row["system"], model, shape, tokens, seconds, row["moe_dtype"])


def _mixture(
    system: str, model: ModelShape, shape: ParallelShape, tokens: int, seconds: float, dtype: str
) -> OperatorSample:
    device, moe, is_fp8 = device_of(system), model.moe, dtype.startswith("fp8")
    assert moe is not None
    if is_fp8:
        model = replace(model, weight_bytes=1.0)

    def predict(to: Efficiency) -> float:
        if not is_fp8:
            return mixture_s(model, moe, shape, tokens, device, to.experts)
        assert to.experts_fp8 is not None
        return mixture_s(model, moe, shape, tokens, device.for_fp8, to.experts_fp8)

    operator = {"bfloat16": "experts", "fp8_block": "experts_fp8", "fp8": "experts_tensor_fp8"}[dtype]
    if shape.dp > 1 or dtype == "fp8":
        operator += "_dp" if shape.dp > 1 else ""
        return OperatorSample(operator, "aiconfigurator", device, seconds, predict, True)
    return OperatorSample(operator, "aiconfigurator", device, seconds, predict, is_held_out(model.name, shape.tp))

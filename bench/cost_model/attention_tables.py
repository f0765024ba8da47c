"""Public tables of measured attention times, as samples: prefill, decode, both in one kernel, latent attention."""

from collections.abc import Callable, Iterator
from pathlib import Path

from bench.cost_model.samples import OperatorSample, device_of, is_held_out, read_rows, served_model
from tandem.core.cost_model import attention_pairs
from tandem.placement.costs.efficiency import Efficiency
from tandem.placement.costs.hardware import Device
from tandem.placement.costs.operators import decode_attention_coefficients, mixed_attention_s, prefill_attention_s

_HEAD_BYTES = 512.0  # of a token's K and V for one KV head of 128 numbers
_MIN_PROMPT_TOKENS = 512  # with fewer, attention is pure latency, and small against the linear layers


def read_attention(folder: Path) -> Iterator[OperatorSample]:
    yield from _prefill_attention(folder)
    yield from _decode_attention(folder)
    yield from _mixed_attention(folder)
    yield from _latent_attention(folder)


def _prefill_attention(folder: Path) -> Iterator[OperatorSample]:
    for row in read_rows(folder, "aic_context_attention_vllm.csv.gz"):
        heads, kv_heads = int(row["num_heads"]), int(row["num_kv_heads"])
        sequences, tokens = int(row["batch_size"]), int(row["query_len"])
        if row["kv_cache_dtype"] != "bfloat16" or sequences * tokens < _MIN_PROMPT_TOKENS:
            continue
        yield _prompts(
            "aiconfigurator", row["system"], heads, kv_heads, sequences, tokens, 0, float(row["latency_ms"]) / 1e3
        )
    name = "llmservingsim_h100_llama70b_tp4_attention_ms.csv.gz"
    for row in read_rows(folder, name):
        chunk, history = int(row["prefill_chunk_size"]), int(row["kv_cache_size"])
        if row["is_prefill"] == "True" and chunk >= _MIN_PROMPT_TOKENS:
            seconds = float(row["latency_ms"]) / 1e3
            yield _prompts("LLMServingSim", "h100_sxm", 16, 2, 1, chunk, history, seconds)
    for row in read_rows(folder, "llmservingsim_attention_us.csv.gz"):
        chunk, history = int(row["prefill_chunk"]), int(row["kv_prefill"])
        if chunk >= _MIN_PROMPT_TOKENS and row["n_decode"] == "0":
            model, tp = served_model(row["model"]), int(row["tp"])
            heads, kv_heads = model.num_heads // tp, model.num_kv_heads // tp
            seconds = float(row["time_us"]) / 1e6
            yield _prompts("LLMServingSim", row["hardware"], heads, kv_heads, 1, chunk, history, seconds)


def _prompts(
    source: str, system: str, heads: int, kv_heads: int, sequences: int, tokens: int, history: int, seconds: float
) -> OperatorSample:
    device = device_of(system)
    num_pairs = sequences * attention_pairs(history, tokens)
    num_bytes = 2.0 * sequences * 128 * (2 * heads * tokens + 2 * kv_heads * (history + tokens))
    return OperatorSample(
        "prefill_attention",
        source,
        device,
        seconds,
        lambda to: prefill_attention_s(num_pairs, num_bytes, sequences, heads, 128, device, to.prefill_attention),
        is_held_out(heads, kv_heads, history) or (source, system) == ("LLMServingSim", "h100_sxm"),
    )


def _decode_attention(folder: Path) -> Iterator[OperatorSample]:
    for row in read_rows(folder, "aic_generation_attention_vllm.csv.gz"):
        heads, kv_heads = int(row["num_heads"]), int(row["num_kv_heads"])
        sequences, tokens = int(row["batch_size"]), int(row["past_kv_len"]) + 1
        seconds = float(row["latency_ms"]) / 1e3
        kv_bytes = {"bfloat16": 2.0, "fp8": 1.0}[row["kv_cache_dtype"]]
        yield from _decodes("aiconfigurator", row["system"], heads, kv_heads, sequences, tokens, seconds, kv_bytes)
    for row in read_rows(folder, "llmservingsim_attention_us.csv.gz"):
        if row["prefill_chunk"] == "0":
            model, tp = served_model(row["model"]), int(row["tp"])
            heads, kv_heads = model.num_heads // tp, model.num_kv_heads // tp
            sequences, tokens = int(row["n_decode"]), int(row["kv_decode"])
            seconds = float(row["time_us"]) / 1e6
            yield from _decodes("LLMServingSim", row["hardware"], heads, kv_heads, sequences, tokens, seconds)


def _decodes(
    source: str,
    system: str,
    heads: int,
    kv_heads: int,
    sequences: int,
    tokens: int,
    seconds: float,
    kv_bytes: float = 2.0,
) -> Iterator[OperatorSample]:
    device, held_out = device_of(system), is_held_out(heads, kv_heads, sequences)
    head_bytes = kv_bytes / 2.0 * _HEAD_BYTES
    if _fits_cache(device, kv_heads, sequences, tokens, head_bytes):
        return
    operator = "decode_kv_fp8" if kv_bytes == 1.0 else "decode_attention"
    predict = _decode(device, heads, kv_heads, sequences, tokens, head_bytes, operator)
    yield OperatorSample(operator, source, device, seconds, predict, held_out)


def _fits_cache(device: Device, kv_heads: int, sequences: int, tokens: int, head_bytes: float = _HEAD_BYTES) -> bool:
    """Whether the measurement can read the KV from the cache repeatedly. A model never can: the weights and KV of its
    other layers go through the cache in between."""
    return head_bytes * sequences * tokens * kv_heads < device.cache_bytes


def _decode(
    device: Device, heads: int, kv_heads: int, sequences: int, tokens: int, head_bytes: float, part: str
) -> Callable[[Efficiency], float]:
    """`part` of Efficiency: that of this kernel."""

    def predict(to: Efficiency) -> float:
        fixed_s, per_token_s = decode_attention_coefficients(
            sequences, kv_heads, kv_heads, head_bytes * kv_heads, 512.0 * heads, device, getattr(to, part)
        )
        return fixed_s + sequences * tokens * per_token_s

    return predict


def _mixed_attention(folder: Path) -> Iterator[OperatorSample]:
    """Prompt chunks of any length and decoding sequences in one kernel."""
    for row in read_rows(folder, "llmservingsim_attention_us.csv.gz"):
        chunk, history, system = int(row["prefill_chunk"]), int(row["kv_prefill"]), row["hardware"]
        sequences, tokens = int(row["n_decode"]), int(row["kv_decode"])
        model, tp = served_model(row["model"]), int(row["tp"])
        heads, kv_heads = model.num_heads // tp, model.num_kv_heads // tp
        seconds, device = float(row["time_us"]) / 1e6, device_of(system)
        if not chunk or (sequences and _fits_cache(device, kv_heads, sequences, tokens)):
            continue
        held_out = is_held_out(heads, kv_heads, chunk, sequences)
        predict = _mixed(device, heads, kv_heads, chunk, history, sequences, tokens)
        yield OperatorSample("mixed_attention", "LLMServingSim", device, seconds, predict, held_out)


def _mixed(
    device: Device, heads: int, kv_heads: int, chunk: int, history: int, sequences: int, tokens: int
) -> Callable[[Efficiency], float]:
    def predict(to: Efficiency) -> float:
        assert to.mixed_attention is not None
        return mixed_attention_s(
            attention_pairs(history, chunk),
            history + chunk,
            sequences,
            sequences * tokens,
            heads,
            kv_heads,
            _HEAD_BYTES,
            128,
            device,
            to.mixed_attention,
        )

    return predict


def _latent_attention(folder: Path) -> Iterator[OperatorSample]:
    """DeepSeek-V3's. On A100s its times include launches of 0.3 ms, unlike those of other devices."""
    for row in read_rows(folder, "aic_mla.csv.gz"):
        sequences, tokens, heads = int(row["batch_size"]), int(row["len_tokens"]), int(row["num_heads"])
        if row["kv_cache_dtype"] != "bfloat16" or sequences * tokens < _MIN_PROMPT_TOKENS:
            continue
        device, seconds = device_of(row["system"]), float(row["latency_ms"]) / 1e3
        is_prompt = row["phase"] == "context"
        yield OperatorSample(
            "latent_prefill" if is_prompt else "latent_decode",
            "aiconfigurator",
            device,
            seconds,
            _latent_prompts(device, sequences, tokens, heads)
            if is_prompt
            else _latent_decode(device, sequences, tokens, heads),
            is_held_out(heads, sequences),
        )


def _latent_prompts(device: Device, sequences: int, tokens: int, heads: int) -> Callable[[Efficiency], float]:
    num_pairs, num_bytes = sequences * attention_pairs(0, tokens), 4.0 * sequences * tokens * heads * (192 + 128)
    return lambda to: prefill_attention_s(num_pairs, num_bytes, sequences, heads, 160, device, to.latent_prefill)


def _latent_decode(device: Device, sequences: int, tokens: int, heads: int) -> Callable[[Efficiency], float]:
    def predict(to: Efficiency) -> float:
        flops = 2.0 * heads * (2 * 512 + 64)
        fixed_s, per_token_s = decode_attention_coefficients(
            sequences, 1, heads, 1152.0, flops, device, to.latent_decode
        )
        return fixed_s + sequences * tokens * per_token_s

    return predict

"""Seconds of one operator on one device: smooth rooflines that increase with every size and decrease with every
peak."""

from math import sqrt

from tandem.placement.costs.efficiency import (
    ConvertingGemmEfficiency,
    DecodeAttentionEfficiency,
    ElementwiseEfficiency,
    ExpertsEfficiency,
    GemmEfficiency,
    LinkEfficiency,
    MixedAttentionEfficiency,
    PrefillAttentionEfficiency,
)
from tandem.placement.costs.hardware import Device

_TILE_ROWS = 128  # queries in one tile of a flash-attention kernel
_RIDGE = 3.0  # `GemmEfficiency.sharpness` of a mixed kernel


def product_s(flops: float, num_bytes: float, device: Device, fit: GemmEfficiency) -> float:
    """A kernel that computes `flops` operations and moves `num_bytes` bytes."""
    compute_s = flops / (device.flops * fit.compute)
    memory_s = num_bytes / (device.memory_bytes_per_s * fit.memory)
    longer, shorter = max(compute_s, memory_s), min(compute_s, memory_s)
    if longer == 0.0:
        return 0.0
    return float(fit.latency_s + longer * (1.0 + (shorter / longer) ** fit.sharpness) ** (1.0 / fit.sharpness))


def gemm_s(m: float, n: float, k: float, weight_bytes: float, device: Device, fit: GemmEfficiency) -> float:
    """y[m, n] = x[m, k] W with `weight_bytes` bytes per weight and 2 bytes per activation."""
    return product_s(2.0 * m * n * k, weight_bytes * n * k + 2.0 * m * (n + k), device, fit)


def gemm_fp8_s(m: float, n: float, k: float, device: Device, fit: ConvertingGemmEfficiency) -> float:
    """As `gemm_s` with one byte per weight, the activations in bf16 before and after."""
    converted_bytes = 3.0 * m * k  # read in bf16, written in fp8
    conversion_s = fit.conversion * converted_bytes / device.memory_bytes_per_s
    return gemm_s(m, n, k, 1.0, device.for_fp8, fit) + conversion_s


def experts_s(
    visits: float, touched: float, weights: float, num_bytes: float, device: Device, fit: ExpertsEfficiency
) -> float:
    """`visits` pairs of token and expert, `touched` different experts of `weights` weights each, `num_bytes` moved."""
    return product_s(2.0 * weights * (visits + fit.padding_rows * touched), num_bytes, device, fit)


def elementwise_s(num_bytes: float, device: Device, fit: ElementwiseEfficiency) -> float:
    """Kernels that move `num_bytes` bytes with negligible compute."""
    if num_bytes == 0:
        return 0.0
    cores_s = num_bytes / (device.num_cores * fit.core_bytes_per_s)
    beyond_bytes = max(0.0, num_bytes - fit.cached * device.cache_bytes)
    return fit.latency_s + cores_s + beyond_bytes / (device.memory_bytes_per_s * fit.memory)


def prefill_attention_s(
    pairs: float,
    num_bytes: float,
    sequences: float,
    heads: float,
    head_dim: float,
    device: Device,
    fit: PrefillAttentionEfficiency,
) -> float:
    """One layer over `pairs` pairs of query and key; Q, K, V and output have `num_bytes` bytes. `head_dim` is the mean
    of the keys' and the values' dimension."""
    if pairs == 0:
        return 0.0
    compute_s = 4.0 * pairs * heads * head_dim / (device.flops * fit.compute)
    wait_s = 4.0 * sqrt(pairs) * _TILE_ROWS * head_dim * fit.idle / (device.flops / device.num_cores)
    tiles_s = sequences * heads * fit.head_s / device.num_cores
    return fit.latency_s + compute_s + wait_s + tiles_s + num_bytes / (device.memory_bytes_per_s * fit.memory)


def decode_attention_coefficients(
    sequences: float,
    kv_heads: float,
    query_heads: float,
    bytes_per_kv_token: float,
    flops_per_kv_token: float,
    device: Device,
    fit: DecodeAttentionEfficiency,
) -> tuple[float, float]:
    """(fixed seconds, seconds per KV token) of one layer's attention of `sequences` one-token queries. The kernel
    processes `query_heads` heads of each query one after the other."""
    read_s = bytes_per_kv_token / (device.memory_bytes_per_s * fit.memory)
    compute_s = flops_per_kv_token / (device.flops * fit.compute)
    per_kv_token_s = max(read_s, compute_s) * (1.0 + fit.idle / (sequences * kv_heads))
    return fit.latency_s + fit.head_s * sequences * query_heads, per_kv_token_s


def mixed_attention_s(
    pairs: float,
    prompt_kv_tokens: float,
    sequences: float,
    kv_tokens: float,
    heads: float,
    kv_heads: float,
    head_bytes: float,
    head_dim: float,
    device: Device,
    fit: MixedAttentionEfficiency,
) -> float:
    """One kernel of one layer over prompts (`pairs` pairs over `prompt_kv_tokens` tokens) and `sequences` decoding
    sequences over `kv_tokens` tokens in total. `head_bytes`: a token's K and V for one KV head."""
    rows = pairs + fit.query_rows * kv_tokens
    compute_s = 4.0 * rows * heads * head_dim / (device.flops * fit.compute)
    in_flight = fit.in_flight * device.num_cores * kv_heads / heads
    waiting = max(0.0, 1.0 - in_flight / sequences) if sequences else 0.0  # share of the sequences
    missed_tokens = max(0.0, waiting * kv_tokens - fit.cached * device.cache_bytes / head_bytes)
    num_bytes = head_bytes * (kv_heads * kv_tokens + (heads - kv_heads) * missed_tokens)
    memory_s = num_bytes / (device.memory_bytes_per_s * fit.memory)
    work_s = float((compute_s**_RIDGE + memory_s**_RIDGE) ** (1.0 / _RIDGE))
    walk_s = fit.walk_s * prompt_kv_tokens
    return fit.latency_s + max(walk_s, work_s + fit.tail * walk_s) + fit.head_s * sequences * heads


def all_reduce_s(num_bytes: float, ranks: int, device: Device, fit: LinkEfficiency) -> float:
    """An all-reduce of `num_bytes` bytes on each of `ranks` devices of a node."""
    if ranks == 1 or num_bytes == 0:
        return 0.0
    contention = float((ranks / 2) ** fit.sharing)
    wire_s = 2.0 * num_bytes * (ranks - 1) / ranks / device.peer_bytes_per_s * contention
    return fit.latency_s + fit.rank_s * ranks + wire_s / fit.bandwidth + sqrt(wire_s * fit.ramp_s)


def send_s(num_bytes: float, bytes_per_s: float, fit: LinkEfficiency) -> float:
    """A message of `num_bytes` bytes from one pipeline stage to the next."""
    return fit.hand_off_s + num_bytes / (bytes_per_s * fit.send)

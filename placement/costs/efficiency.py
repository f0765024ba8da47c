"""The shares of a device's peaks that kernels reach, by device family and operator, and the overheads of engines.

`python -m bench.cost_model fit` fitted the numbers in `placement/data/efficiency.yaml` to public measurements; the
formulas are in `placement.costs.operators`. Latencies are in seconds, shares are of the device's peak.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any

from tandem.placement.costs.catalogue import find_name, read_yaml

_FUSED = frozenset({"latency_s", "conversion"})  # what an engine's `latency` multiplies
_SLOWED = frozenset({"compute", "bandwidth", "send"})  # shares that an engine's `slowdown` divides


@dataclass(frozen=True, slots=True)
class GemmEfficiency:
    """A large product reaches `compute` of the FLOP/s, a thin product reads its operands at `memory` of the bandwidth.
    Near the ridge both times count: `sharpness` 1 adds them, infinity takes the maximum."""

    latency_s: float
    compute: float
    memory: float
    sharpness: float


@dataclass(frozen=True, slots=True)
class ConvertingGemmEfficiency(GemmEfficiency):
    """A product in fp8 of activations in bf16: their conversion takes `conversion` times as long as reading and writing
    them at the peak of the memory."""

    conversion: float


@dataclass(frozen=True, slots=True)
class ExpertsEfficiency(GemmEfficiency):
    """The grouped product of a mixture: each used expert computes `padding_rows` rows of padding."""

    padding_rows: float


@dataclass(frozen=True, slots=True)
class ElementwiseEfficiency:
    """Norms, rotation, activation and residuals. Each core moves `core_bytes_per_s`. A kernel reads the output of the
    kernel before it, so only the bytes beyond `cached` times the last-level cache come from memory, at `memory` of the
    bandwidth."""

    latency_s: float
    core_bytes_per_s: float
    memory: float
    cached: float


@dataclass(frozen=True, slots=True)
class PrefillAttentionEfficiency:
    """A flash-attention kernel over prompts: score and value products at `compute`; Q, K, V and output once each at
    `memory`; the wait for the last core, proportional to `idle` and to the square root of the work; and `head_s` of a
    core for each sequence and head of any length."""

    latency_s: float
    compute: float
    memory: float
    idle: float
    head_s: float


@dataclass(frozen=True, slots=True)
class DecodeAttentionEfficiency:
    """A kernel that reads the KV of one-token queries at `memory`. Few sequences leave cores idle: the relative extra
    time is `idle` / (sequences * KV heads). Each sequence and KV head adds `head_s`; with a shared latent, each
    sequence and query head. With a latent the products, at `compute`, may take longer than the reads."""

    latency_s: float
    memory: float
    idle: float
    head_s: float
    compute: float


@dataclass(frozen=True, slots=True)
class MixedAttentionEfficiency:
    """One kernel over prompts and one-token queries, which computes in tiles of many rows.

    A one-token query costs the products of `query_rows` rows, at `compute`. KV is read at `memory` of the bandwidth,
    once for every KV head. KV beyond `cached` times the last-level cache, of sequences beyond the
    `in_flight` * cores * KV heads / heads that are computed at the same time, is read once for every query head. A core
    reads a prompt's KV in `walk_s` per token: the kernel takes at least the longest such walk, and at least the work
    plus `tail` times that walk. Each decoding sequence and head adds `head_s`."""

    latency_s: float
    compute: float
    memory: float
    query_rows: float
    cached: float
    in_flight: float
    walk_s: float
    tail: float
    head_s: float


@dataclass(frozen=True, slots=True)
class LinkEfficiency:
    """Links between the devices of a node. A collective takes `latency_s`, `rank_s` per rank, and t / `bandwidth` +
    sqrt(t * `ramp_s`), where t is the time at the link's peak: only large messages fill a link. Where devices share the
    links of their host, t grows with the power `sharing` of half the ranks. A message between pipeline stages takes
    `hand_off_s` and its bytes at `send` of the peak."""

    latency_s: float
    rank_s: float
    ramp_s: float
    bandwidth: float
    hand_off_s: float
    send: float
    sharing: float = 0.0


@dataclass(frozen=True, slots=True)
class Efficiency:
    """`gemm_fp8` and `experts_fp8` are products of weights and activations in fp8, the latter's conversion included;
    `decode_kv_fp8` reads KV in fp8. None: not measured, or such devices have no such products. `link` is NVLink, `pcie`
    is for devices without it."""

    gemm: GemmEfficiency
    experts: ExpertsEfficiency
    prefill_attention: PrefillAttentionEfficiency
    decode_attention: DecodeAttentionEfficiency
    latent_prefill: PrefillAttentionEfficiency  # latent attention has kernels of its own
    latent_decode: DecodeAttentionEfficiency
    mixed_attention: MixedAttentionEfficiency | None  # None: prompts and decoding are two kernels
    link: LinkEfficiency
    pcie: LinkEfficiency
    elementwise: ElementwiseEfficiency
    gemm_fp8: ConvertingGemmEfficiency | None = None
    experts_fp8: ExpertsEfficiency | None = None
    decode_kv_fp8: DecodeAttentionEfficiency | None = None

    def slowed(self, factor: float, latency: float = 1.0) -> "Efficiency":
        """The same with compute and NVLink slower by `factor`, and with `latency` times the conversion of activations
        and the latencies of kernels, those of collectives excepted. What memory and hosts bound stays: old and new
        kernels read weights and KV, and send over PCIe, at about the same speed."""
        slow: dict[str, Any] = {}
        for part in fields(self):
            if (fit := getattr(self, part.name)) is None:
                slow[part.name] = None
                continue
            names = {field.name for field in fields(fit)}
            slowed = frozenset() if part.name == "pcie" else _SLOWED & names
            changed = {name: getattr(fit, name) / factor for name in slowed}
            if not isinstance(fit, LinkEfficiency):
                changed |= {name: latency * getattr(fit, name) for name in _FUSED & names}
            slow[part.name] = replace(fit, **changed)
        return Efficiency(**slow)


@dataclass(frozen=True, slots=True)
class EngineOverhead:
    """The overhead of an engine: `step_s` per step and `sequence_s` per sampling sequence. The CPU launches the kernels
    of one layer in `eager_layer_s`, plus `prompt_layer_s` for prompts; a step without CUDA graphs is at least that long
    times the layers. `graph_decode`: decode-only steps use CUDA graphs. Compute and NVLink are `slowdown` times slower
    than the efficiencies (older kernels, a power limit). Kernels have the part `latency` of their latencies, and of the
    conversion to fp8, in an engine that fuses some and launches the next before one ends. Collectives of more than two
    ranks are congested: bytes of a message beyond `free_bytes` take `congestion_s` * (ranks - 2) / ranks longer
    each."""

    step_s: float
    sequence_s: float
    eager_layer_s: float
    graph_decode: bool
    slowdown: float = 1.0
    latency: float = 1.0
    prompt_layer_s: float = 0.0
    free_bytes: float = 0.0
    congestion_s: float = 0.0


def efficiency(family: str) -> Efficiency:
    """The fitted efficiencies of a device family; those of `default` for a family without measurements."""
    known = _tables()[0]
    return known.get(family, known["default"])


def engine_overhead(engine: str) -> EngineOverhead:
    """Raises ConfigError for an unknown engine."""
    known = _tables()[1]
    return known[find_name(engine, known, "engine")]


def step_error() -> float:
    """Median relative error of complete steps outside the fit, as measured by `bench.cost_model check`."""
    return _tables()[2]


def parse(entry: Mapping[str, Any]) -> Efficiency:
    """One family's entry of efficiency.yaml."""
    mixed = entry.get("mixed_attention")
    return Efficiency(
        gemm=GemmEfficiency(**entry["gemm"]),
        experts=ExpertsEfficiency(**entry["experts"]),
        prefill_attention=PrefillAttentionEfficiency(**entry["prefill_attention"]),
        decode_attention=DecodeAttentionEfficiency(**entry["decode_attention"]),
        latent_prefill=PrefillAttentionEfficiency(**entry["latent_prefill"]),
        latent_decode=DecodeAttentionEfficiency(**entry["latent_decode"]),
        mixed_attention=None if mixed is None else MixedAttentionEfficiency(**mixed),
        link=LinkEfficiency(**entry["link"]),
        pcie=LinkEfficiency(**entry["pcie"]),
        elementwise=ElementwiseEfficiency(**entry["elementwise"]),
        gemm_fp8=ConvertingGemmEfficiency(**entry["gemm_fp8"]) if "gemm_fp8" in entry else None,
        experts_fp8=ExpertsEfficiency(**entry["experts_fp8"]) if "experts_fp8" in entry else None,
        decode_kv_fp8=DecodeAttentionEfficiency(**entry["decode_kv_fp8"]) if "decode_kv_fp8" in entry else None,
    )


@cache
def _tables() -> tuple[Mapping[str, Efficiency], Mapping[str, EngineOverhead], float]:
    data = read_yaml("efficiency.yaml")
    families = {name: parse(entry) for name, entry in data["families"].items()}
    engines = {name: EngineOverhead(**entry) for name, entry in data["engines"].items()}
    return MappingProxyType(families), MappingProxyType(engines), float(data["step_error"])

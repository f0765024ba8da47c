"""How much of a device's peaks its kernels reach, by family of devices and by operator, and what engines add.

The numbers in `placement/data/efficiency.yaml` were fitted to public measurements by `python -m bench.cost_model fit`;
the forms that they parametrise are in `placement.operators`. Latencies are seconds; shares are of the device's peak.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from placement.catalogue import find_name, read_yaml


@dataclass(frozen=True, slots=True)
class GemmEfficiency:
    """A large product reaches `compute` of the FLOP/s, a thin one reads its operands at `memory` of the bandwidth.
    Near the ridge both cost: `sharpness` 1 adds them, infinity takes the larger one."""

    latency_s: float
    compute: float
    memory: float
    sharpness: float


@dataclass(frozen=True, slots=True)
class PrefillAttentionEfficiency:
    """Of a flash-attention kernel over prompts: score and value products, and Q, K, V, output once each."""

    latency_s: float
    compute: float
    memory: float


@dataclass(frozen=True, slots=True)
class DecodeAttentionEfficiency:
    """Of a kernel that reads the KV of one-token queries. `idle` / (sequences * KV heads) more time goes by where
    few sequences leave cores without work; `head_s` passes per sequence and query head."""

    latency_s: float
    memory: float
    idle: float
    head_s: float


@dataclass(frozen=True, slots=True)
class LinkEfficiency:
    """Collectives between the devices of a node: `latency_s` and `rank_s` per rank at least, then the link's
    `bandwidth` share. `hand_off_s` is what a pipeline's stage boundary costs at least."""

    latency_s: float
    rank_s: float
    bandwidth: float
    hand_off_s: float


@dataclass(frozen=True, slots=True)
class Efficiency:
    gemm: GemmEfficiency
    experts: GemmEfficiency
    prefill_attention: PrefillAttentionEfficiency
    decode_attention: DecodeAttentionEfficiency
    link: LinkEfficiency
    elementwise: GemmEfficiency  # norms, rotation, activation, residuals: `memory` only


@dataclass(frozen=True, slots=True)
class EngineOverhead:
    """What an engine's CPU side adds to a step: `step_s`, and `sequence_s` per sequence that samples. Launching one
    layer's kernels takes it `eager_layer_s`, so that no step without CUDA graphs is shorter than that times the
    layers; `graph_decode`: steps that only decode are one launch."""

    step_s: float
    sequence_s: float
    eager_layer_s: float
    graph_decode: bool


def efficiency(family: str) -> Efficiency:
    """The fitted efficiencies of a family of devices; those of `default` for one that was never measured."""
    known = _tables()[0]
    return known.get(family, known["default"])


def engine_overhead(engine: str) -> EngineOverhead:
    """Raises ConfigError for an unknown engine."""
    known = _tables()[1]
    return known[find_name(engine, known, "engine")]


def step_error() -> float:
    """Median relative error of whole steps that were not fitted, as `bench.cost_model check` measured it."""
    return _tables()[2]


def parse(entry: Mapping[str, Any]) -> Efficiency:
    """One family's entry of efficiency.yaml."""
    return Efficiency(
        gemm=GemmEfficiency(**entry["gemm"]),
        experts=GemmEfficiency(**entry["experts"]),
        prefill_attention=PrefillAttentionEfficiency(**entry["prefill_attention"]),
        decode_attention=DecodeAttentionEfficiency(**entry["decode_attention"]),
        link=LinkEfficiency(**entry["link"]),
        elementwise=GemmEfficiency(**entry["elementwise"]),
    )


@cache
def _tables() -> tuple[Mapping[str, Efficiency], Mapping[str, EngineOverhead], float]:
    data = read_yaml("efficiency.yaml")
    families = {name: parse(entry) for name, entry in data["families"].items()}
    engines = {name: EngineOverhead(**entry) for name, entry in data["engines"].items()}
    return MappingProxyType(families), MappingProxyType(engines), float(data["step_error"])

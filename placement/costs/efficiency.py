"""How much of a device's peaks its kernels reach, by family of devices and by operator, and what engines add.

The numbers in `placement/data/efficiency.yaml` were fitted to public measurements by `python -m bench.cost_model fit`;
the forms that they parametrise are in `placement.costs.operators`. Latencies are seconds, shares are of the device's
peak.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any

from placement.costs.catalogue import find_name, read_yaml

_SLOWED = frozenset({"compute", "bandwidth", "send"})  # shares of a peak that other kernels may not reach


@dataclass(frozen=True, slots=True)
class GemmEfficiency:
    """A large product reaches `compute` of the FLOP/s, a thin one reads its operands at `memory` of the bandwidth.
    Near the ridge both cost: `sharpness` 1 adds them, infinity takes the larger one."""

    latency_s: float
    compute: float
    memory: float
    sharpness: float


@dataclass(frozen=True, slots=True)
class ExpertsEfficiency(GemmEfficiency):
    """Of the grouped product of a mixture: each expert that is visited computes `padding_rows` rows in vain."""

    padding_rows: float


@dataclass(frozen=True, slots=True)
class PrefillAttentionEfficiency:
    """Of a flash-attention kernel over prompts: score and value products at `compute`; Q, K, V and output once each at
    `memory`; and what cores wait for the last of them, which grows with the root of the work: `idle`."""

    latency_s: float
    compute: float
    memory: float
    idle: float


@dataclass(frozen=True, slots=True)
class DecodeAttentionEfficiency:
    """Of a kernel that reads the KV of one-token queries. `idle` / (sequences * KV heads) more time goes by where
    few sequences leave cores without work; `head_s` passes per sequence and KV head. Only where many query heads share
    a latent are the products, at `compute`, what it waits for; or beside prompts, where the kernel that does both
    computes `mixed_rows` rows for each query."""

    latency_s: float
    memory: float
    idle: float
    head_s: float
    compute: float
    mixed_rows: float


@dataclass(frozen=True, slots=True)
class LinkEfficiency:
    """Between the devices of a node. A collective takes `latency_s` and `rank_s` per rank; then what the link's peak
    would take, t, becomes t / `bandwidth` + sqrt(t * `ramp_s`): only large messages fill a link. From one device to
    another, as between a pipeline's stages: `hand_off_s`, then `send` of the peak."""

    latency_s: float
    rank_s: float
    ramp_s: float
    bandwidth: float
    hand_off_s: float
    send: float


@dataclass(frozen=True, slots=True)
class Efficiency:
    gemm: GemmEfficiency
    experts: ExpertsEfficiency
    prefill_attention: PrefillAttentionEfficiency
    decode_attention: DecodeAttentionEfficiency
    link: LinkEfficiency
    elementwise: GemmEfficiency  # norms, rotation, activation, residuals: `memory` only

    def slowed(self, factor: float) -> "Efficiency":
        """The same with what is computed and sent slower by `factor`. Latencies stay, and so does reading memory:
        kernels of any age read weights and KV about as fast."""

        slow: dict[str, Any] = {}
        for part in fields(self):
            fit = getattr(self, part.name)
            shares = _SLOWED & {field.name for field in fields(fit)}
            slow[part.name] = replace(fit, **{name: getattr(fit, name) / factor for name in shares})
        return Efficiency(**slow)


@dataclass(frozen=True, slots=True)
class EngineOverhead:
    """What an engine adds to a step: `step_s`, and `sequence_s` per sequence that samples. Launching one layer's
    kernels takes its CPU `eager_layer_s`, so that no step without CUDA graphs is shorter than that times the layers;
    `graph_decode`: steps that only decode are one launch. It computes and sends `slowdown` times slower than the
    efficiencies say (older kernels, a device that is short of power)."""

    step_s: float
    sequence_s: float
    eager_layer_s: float
    graph_decode: bool
    slowdown: float = 1.0


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
        experts=ExpertsEfficiency(**entry["experts"]),
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

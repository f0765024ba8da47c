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

from tandem.placement.costs.catalogue import find_name, read_yaml

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
class ElementwiseEfficiency:
    """Of norms, rotation, activation and residuals. Each core moves `core_bytes_per_s`, from wherever; what is beyond
    `cached` times the last-level cache comes from memory, at `memory` of the bandwidth, since a kernel reads what the
    one before has just written."""

    latency_s: float
    core_bytes_per_s: float
    memory: float
    cached: float


@dataclass(frozen=True, slots=True)
class PrefillAttentionEfficiency:
    """Of a flash-attention kernel over prompts: score and value products at `compute`; Q, K, V and output once each at
    `memory`; what cores wait for the last of them, which grows with the root of the work: `idle`; and `head_s` that a
    core spends on each sequence and head, however short."""

    latency_s: float
    compute: float
    memory: float
    idle: float
    head_s: float


@dataclass(frozen=True, slots=True)
class DecodeAttentionEfficiency:
    """Of a kernel that reads the KV of one-token queries. `idle` / (sequences * KV heads) more time goes by where
    few sequences leave cores without work; `head_s` passes per sequence and KV head (query head, where all of them
    share a latent). Only there are the products, at `compute`, what it waits for."""

    latency_s: float
    memory: float
    idle: float
    head_s: float
    compute: float


@dataclass(frozen=True, slots=True)
class MixedAttentionEfficiency:
    """Of one kernel over prompts and one-token queries at once, which computes in tiles of many rows.

    A query of one token costs the products of `query_rows`, at `compute`. KV is read at `memory` of the bandwidth; not
    once for every KV head but for every query head, of what exceeds both `cached` times the last-level cache and the
    sequences that are in work at once (`in_flight` * cores * KV heads / heads). A core passes along a prompt's KV at
    `walk_s` a token: the kernel lasts as long as the longest such walk, and `tail` of it beyond the work. `head_s`
    passes per decoding sequence and head."""

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
    latent_prefill: PrefillAttentionEfficiency  # latent attention has kernels of its own
    latent_decode: DecodeAttentionEfficiency
    mixed_attention: MixedAttentionEfficiency | None  # None: prompts and decoding are two kernels
    link: LinkEfficiency
    elementwise: ElementwiseEfficiency

    def slowed(self, factor: float) -> "Efficiency":
        """The same with what is computed and sent slower by `factor`. Latencies stay, and so does reading memory:
        kernels of any age read weights and KV about as fast."""

        slow: dict[str, Any] = {}
        for part in fields(self):
            if (fit := getattr(self, part.name)) is None:
                slow[part.name] = None
                continue
            shares = _SLOWED & {field.name for field in fields(fit)}
            slow[part.name] = replace(fit, **{name: getattr(fit, name) / factor for name in shares})
        return Efficiency(**slow)


@dataclass(frozen=True, slots=True)
class EngineOverhead:
    """What an engine adds to a step: `step_s`, and `sequence_s` per sequence that samples. Launching one layer's
    kernels takes its CPU `eager_layer_s`, and `prompt_layer_s` more where there are prompts, so that no step without
    CUDA graphs is shorter than that times the layers; `graph_decode`: steps that only decode are one launch. It
    computes and sends `slowdown` times slower than the efficiencies say (older kernels, a device that is short of
    power). Collectives of more than two ranks are congested beyond `free_bytes` a message: what is beyond takes
    `congestion_s` a byte more, times (ranks - 2) / ranks."""

    step_s: float
    sequence_s: float
    eager_layer_s: float
    graph_decode: bool
    slowdown: float = 1.0
    prompt_layer_s: float = 0.0
    free_bytes: float = 0.0
    congestion_s: float = 0.0


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
        elementwise=ElementwiseEfficiency(**entry["elementwise"]),
    )


@cache
def _tables() -> tuple[Mapping[str, Efficiency], Mapping[str, EngineOverhead], float]:
    data = read_yaml("efficiency.yaml")
    families = {name: parse(entry) for name, entry in data["families"].items()}
    engines = {name: EngineOverhead(**entry) for name, entry in data["engines"].items()}
    return MappingProxyType(families), MappingProxyType(engines), float(data["step_error"])

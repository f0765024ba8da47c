"""Fits the efficiencies of a family of devices to the samples that are not held out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from bench.cost_model.samples import OperatorSample
from tandem.placement.costs.efficiency import Efficiency

_OPERATORS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    # Part of Efficiency, operators that it is fitted to, and the fields that they determine
    ("gemm", ("gemm",), ("latency_s", "compute", "memory", "sharpness")),
    ("gemm_fp8", ("gemm_fp8",), ("latency_s", "compute", "memory", "sharpness", "conversion")),
    ("experts", ("experts",), ("latency_s", "compute", "memory", "sharpness", "padding_rows")),
    ("experts_fp8", ("experts_fp8",), ("latency_s", "compute", "memory", "sharpness", "padding_rows")),
    ("prefill_attention", ("prefill_attention",), ("latency_s", "compute", "memory", "idle", "head_s")),
    ("decode_attention", ("decode_attention",), ("latency_s", "memory", "idle", "head_s")),
    ("decode_kv_fp8", ("decode_kv_fp8",), ("latency_s", "memory", "idle", "head_s", "compute")),
    ("latent_prefill", ("latent_prefill",), ("latency_s", "compute", "memory", "idle", "head_s")),
    ("latent_decode", ("latent_decode",), ("latency_s", "memory", "idle", "head_s", "compute")),
    (
        "mixed_attention",
        ("mixed_attention",),
        ("latency_s", "compute", "memory", "query_rows", "cached", "in_flight", "walk_s", "tail", "head_s"),
    ),
    ("link", ("all_reduce",), ("latency_s", "rank_s", "ramp_s", "bandwidth")),
    ("link", ("send",), ("hand_off_s", "send")),
    ("pcie", ("all_reduce_pcie",), ("latency_s", "rank_s", "ramp_s", "bandwidth", "sharing")),
    ("elementwise", ("elementwise",), ("latency_s", "core_bytes_per_s", "memory", "cached")),
)
_LEAST, _MOST = 1e-4, 1e4  # of other parameters, as a multiple of their start
_SHARES = frozenset({"compute", "memory", "bandwidth", "send"})  # of a peak
_MOST_SHARE = {"elementwise": 4.0}  # by part: the output of the previous kernel is read from the cache
_MOST_SHARE_ELSEWHERE = 1.0  # a benchmark may find operands in the cache, a step of a model never does
_MAX_SAMPLES = 3000


@dataclass(frozen=True, slots=True)
class OperatorError:
    """Absolute values of the relative errors of predicted times."""

    operator: str
    source: str
    device: str
    held_out: bool
    count: int
    median: float
    p90: float
    bias: float  # median of the signed ones


def fit(samples: Sequence[OperatorSample], start: Efficiency) -> Efficiency:
    """The efficiency with the least squares of log(predicted / measured), outliers weighted linearly. Parts without
    samples stay as in `start`."""
    result = start
    for part, operators, names in _OPERATORS:
        chosen = [sample for sample in samples if sample.operator in operators and not sample.held_out]
        if len(chosen) > 2 * len(names):
            result = _fit_part(chosen[:: 1 + len(chosen) // _MAX_SAMPLES], result, part, names)
    return result


def _fit_part(samples: Sequence[OperatorSample], start: Efficiency, part: str, names: Sequence[str]) -> Efficiency:
    first = getattr(start, part)
    scale = np.array([getattr(first, name) for name in names])
    most = np.log([_most(part, name, value) for name, value in zip(names, scale, strict=True)])
    least = np.where([name == "sharpness" for name in names], np.log(1.0 / scale), np.log(_LEAST))
    measured = np.log([sample.seconds for sample in samples])

    def at(logs: Any) -> Efficiency:
        values = dict(zip(names, (scale * np.exp(logs)).tolist(), strict=True))
        return replace(start, **{part: replace(first, **values)})

    def residuals(logs: Any) -> Any:
        trial = at(logs)
        return np.log([sample.predict(trial) for sample in samples]) - measured

    found = least_squares(
        residuals,
        np.minimum(0.0, most - 1e-3),
        bounds=(least, most),
        loss="soft_l1",
        f_scale=0.1,
    )
    return at(found.x)


def _most(part: str, name: str, value: float) -> float:
    """As a multiple of `value`."""
    return _MOST_SHARE.get(part, _MOST_SHARE_ELSEWHERE) / value if name in _SHARES else _MOST


def errors(samples: Sequence[OperatorSample], fitted: Mapping[str, Efficiency]) -> list[OperatorError]:
    """One for each operator, source and device, separately for fitted and held-out samples."""
    groups: dict[tuple[str, str, str, bool], list[float]] = {}
    for sample in samples:
        key = sample.operator, sample.source, sample.device.name, sample.held_out
        predicted = sample.predict(fitted[sample.device.family])
        groups.setdefault(key, []).append(predicted / sample.seconds - 1)
    return [OperatorError(*key, len(group), *_quantiles(group)) for key, group in sorted(groups.items())]


def _quantiles(signed: Sequence[float]) -> tuple[float, float, float]:
    absolute = np.abs(signed)
    return float(np.median(absolute)), float(np.quantile(absolute, 0.9)), float(np.median(signed))


def as_yaml(efficiency: Efficiency) -> dict[str, dict[str, float]]:
    """Rounded to three digits."""
    return {
        part: {name: float(f"{value:.3g}") for name, value in values.items()}
        for part, values in asdict(efficiency).items()
        if values is not None  # the family has no mixed kernel
    }

"""Engines' overheads from points that they served, and errors of what the simulator serves with them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from bench.cost_model.served import SLOWDOWNS, PricedPoint
from tandem.placement.costs.efficiency import EngineOverhead

_START = {"step_s": 1e-3, "sequence_s": 10e-6, "slowdown": 1.1, "latency": 0.8}
_LEAST = {"step_s": 0.0, "sequence_s": 0.0, "slowdown": SLOWDOWNS[0], "latency": 0.0}
_MOST = {"step_s": 1.0, "sequence_s": 1e-2, "slowdown": SLOWDOWNS[-1], "latency": 2.0}


@dataclass(frozen=True, slots=True)
class ServedError:
    """Relative errors: median and 90 % quantile of their absolute values, and the median with its sign (bias)."""

    tpot: tuple[float, float, float]
    throughput: tuple[float, float, float]
    count: int


def fit_served(points: Sequence[PricedPoint]) -> EngineOverhead:
    """The least squares of log(simulated / measured) of TPOT and throughput, outliers weighted linearly."""
    scale = np.array(list(_START.values()))

    def at(factors: Sequence[float]) -> EngineOverhead:
        values = dict(zip(_START, (scale * factors).tolist(), strict=True))
        return EngineOverhead(eager_layer_s=0.0, graph_decode=True, **values)

    def residuals(factors: Sequence[float]) -> list[float]:
        overhead, found = at(factors), []
        for priced in points:
            point, (ttft_s, tpot_s) = priced.point, priced.times_s(overhead)
            found.append(math.log(tpot_s / point.tpot_s))
            found.append(math.log(point.throughput_of(ttft_s, tpot_s) / point.throughput))
        return found

    least, most = (np.array(list(ends.values())) / scale for ends in (_LEAST, _MOST))
    found = least_squares(residuals, np.ones(len(scale)), bounds=(least, most), loss="soft_l1", f_scale=0.1)
    return at(found.x)


def served_error(points: Sequence[PricedPoint], overhead: EngineOverhead) -> ServedError:
    tpot, throughput = [], []
    for priced in points:
        point, (ttft_s, tpot_s) = priced.point, priced.times_s(overhead)
        tpot.append(tpot_s / point.tpot_s - 1)
        throughput.append(point.throughput_of(ttft_s, tpot_s) / point.throughput - 1)
    return ServedError(_figures(tpot), _figures(throughput), len(points))


def _figures(signed: Sequence[float]) -> tuple[float, float, float]:
    absolute = np.abs(signed)
    return float(np.median(absolute)), float(np.quantile(absolute, 0.9)), float(np.median(signed))


def mean_overhead(overheads: Sequence[EngineOverhead]) -> EngineOverhead:
    values = {name: float(np.mean([getattr(overhead, name) for overhead in overheads])) for name in _START}
    return EngineOverhead(eager_layer_s=0.0, graph_decode=True, **values)

"""Lines of the tables that `python -m bench.cost_model` prints: errors of operators, of steps, of what is served."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from bench.cost_model.fit import errors
from bench.cost_model.open_loop import OpenLoopError
from bench.cost_model.samples import OperatorSample
from bench.cost_model.served import PricedPoint
from bench.cost_model.served_fit import ServedError, fit_served, mean_overhead, served_error
from bench.cost_model.steps import StepSample
from tandem.placement.costs.efficiency import Efficiency, EngineOverhead

T = TypeVar("T")

NO_OVERHEAD = EngineOverhead(step_s=0.0, sequence_s=0.0, eager_layer_s=0.0, graph_decode=True)
_MIN_POINTS = 8  # to fit to
_SERVED_HEADINGS = ("points", "TPOT", "p90", "bias", "req/s", "p90", "bias")


def operator_lines(samples: Sequence[OperatorSample], families: Mapping[str, Efficiency]) -> list[str]:
    lines = [_line("operator", "source", "device", "half", "rows", "median", "p90", "bias")]
    for error in errors(samples, families):
        half, figures = _half(error.held_out), _figures((error.median, error.p90, error.bias))
        lines.append(_line(error.operator, error.source, error.device, half, str(error.count), *figures))
    return lines


def step_lines(
    steps: Sequence[StepSample], families: Mapping[str, Efficiency], engines: Mapping[str, EngineOverhead]
) -> list[str]:
    lines = ["", _line("step", "system", "device", "half", "rows", "median", "p90", "bias")]
    found = _relative_errors(steps, families, engines)
    for (system, phase, device, held_out), signed in sorted(found.items()):
        absolute = np.abs(signed)
        figures = _figures((np.median(absolute), np.quantile(absolute, 0.9), np.median(signed)))
        lines.append(_line(phase, system, device, _half(held_out), str(len(signed)), *figures))
    return lines


def served_lines(points: Sequence[PricedPoint], engines: Mapping[str, EngineOverhead]) -> list[str]:
    """A line for each engine, device, precision and half, and one for all held-out points of each engine."""
    lines = ["", _line("served", "device", "weights", "half", *_SERVED_HEADINGS)]

    def kind(priced: PricedPoint) -> tuple[str, str, str, bool]:
        point = priced.point
        return point.engine, point.device.name, "fp8" if point.model.weight_bytes == 1.0 else "bf16", point.held_out

    for (engine, device, weights, held_out), group in sorted(_grouped(points, kind).items()):
        lines.append(_served_line(engine, device, weights, _half(held_out), served_error(group, engines[engine])))
    for engine, of_engine in sorted(_grouped(points, _engine).items()):
        unseen = [priced for priced in of_engine if priced.point.held_out]
        lines.append(_served_line(engine, "all", "all", "held out", served_error(unseen, engines[engine])))
    return lines


def open_loop_lines(found: Sequence[OpenLoopError]) -> list[str]:
    lines = ["", _line("open loop", "model", "device", "tp", "TTFT", "TPOT", "req/s")]
    for error in found:
        figures = (f"{value:+.1%}" for value in (error.ttft, error.tpot, error.throughput))
        lines.append(_line("vllm", error.run.model, error.run.hardware, str(error.run.tp), *figures))
    return lines


def transfer_lines(points: Sequence[PricedPoint]) -> list[str]:
    """Errors on each device by an overhead that is fitted to the engine's points on its other devices, and of each
    engine by the mean overhead of the other engines."""
    lines = ["", _line("left out", "device", "weights", "fitted to", *_SERVED_HEADINGS)]
    by_engine = _grouped(points, _engine)
    for engine, of_engine in sorted(by_engine.items()):
        for device, left_out in sorted(_grouped(of_engine, lambda priced: priced.point.device.name).items()):
            others = [priced for priced in of_engine if priced.point.device.name != device]
            if len(others) >= _MIN_POINTS:
                error = served_error(left_out, fit_served(others))
                lines.append(_served_line(engine, device, "all", "devices", error))
    whole = {engine: fit_served(of_engine) for engine, of_engine in by_engine.items()}
    for engine, of_engine in sorted(by_engine.items()):
        others_mean = mean_overhead([overhead for other, overhead in whole.items() if other != engine])
        lines.append(_served_line(engine, "all", "all", "engines", served_error(of_engine, others_mean)))
    return lines


def model_error(
    steps: Sequence[StepSample],
    points: Sequence[PricedPoint],
    families: Mapping[str, Efficiency],
    engines: Mapping[str, EngineOverhead],
) -> float:
    """Mean over the systems of the median held-out error of steps, and of TPOT where it is served."""
    found = _relative_errors((step for step in steps if step.held_out), families, engines)
    by_system: dict[str, list[float]] = {}
    for (system, *_), signed in found.items():
        by_system.setdefault(system, []).extend(signed)
    medians = [float(np.median(np.abs(signed))) for signed in by_system.values()]
    for engine, group in _grouped([priced for priced in points if priced.point.held_out], _engine).items():
        medians.append(served_error(group, engines[engine]).tpot[0])
    return float(np.mean(medians))


def _relative_errors(
    steps: Iterable[StepSample], families: Mapping[str, Efficiency], engines: Mapping[str, EngineOverhead]
) -> dict[tuple[str, str, str, bool], list[float]]:
    """(system, phase, device, held out) -> signed relative errors."""
    found: dict[tuple[str, str, str, bool], list[float]] = {}
    for step in steps:
        overhead = engines.get(step.system, NO_OVERHEAD)
        error = step.predict(families[step.device.family], overhead) / step.seconds - 1
        found.setdefault((step.system, step.phase, step.device.name, step.held_out), []).append(error)
    return found


def _engine(priced: PricedPoint) -> str:
    return priced.point.engine


def _grouped(points: Iterable[PricedPoint], key: Callable[[PricedPoint], T]) -> dict[T, list[PricedPoint]]:
    groups: dict[T, list[PricedPoint]] = {}
    for priced in points:
        groups.setdefault(key(priced), []).append(priced)
    return groups


def _served_line(engine: str, device: str, weights: str, half: str, error: ServedError) -> str:
    return _line(engine, device, weights, half, str(error.count), *_figures(error.tpot), *_figures(error.throughput))


def _figures(error: tuple[float, float, float]) -> tuple[str, str, str]:
    """Median, 90 % quantile, bias."""
    median, p90, bias = error
    return f"{median:.1%}", f"{p90:.1%}", f"{bias:+.1%}"


def _half(held_out: bool) -> str:
    return "held out" if held_out else "fitted"


def _line(*cells: str) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:4], (18, 16, 23, 10), strict=True)]
    return "".join(left + [cell.rjust(8) for cell in cells[4:]])

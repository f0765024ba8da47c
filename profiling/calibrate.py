"""Measures a checkpoint on this machine: the engine's steps on one rank and on several, their fit, what serving adds,
and what ranks and instances exchange."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch

from tandem.core.instance_section import EngineSection, InstanceSection
from tandem.core.kv_layout import KvLayout
from tandem.core.parallel import ParallelShape
from tandem.deploy.machine import usable_cores
from tandem.engine.device import choose_device
from tandem.placement.costs.calibration import Calibration
from tandem.placement.costs.step_fit import CalibratedCost, Measurement, fit_error, fit_terms
from tandem.profiling.collective_profile import measure_collectives
from tandem.profiling.engine_profile import EngineProfiler, open_profiler, profile_grid
from tandem.profiling.kv_transfer_profile import measure_transfers
from tandem.profiling.serving_fit import with_serving
from tandem.profiling.serving_profile import measure_serving
from tandem.profiling.shape_profile import (
    FOLLOWING_SHARE,
    OneRank,
    measure_shape,
    measure_shape_serving,
    settings_of,
)
from tandem.scheduling.budget import PREFILL_BATCH_TOKENS

ReportProgress = Callable[[float, str], None]
"""(share of the measurement that is done, what is being measured)."""

_SHAPE_SHARE = 1 / 3  # of the time that one rank gets, for each shape of several
_STAGES_SHARE = _SHAPE_SHARE / (1 - FOLLOWING_SHARE)  # with several stages, whose steps also follow each other
_EXCHANGES_S = 10.0  # of all sums, messages and transfers, approximately

_SMALL_SHAPES = (ParallelShape(tp=2), ParallelShape(pp=2))


def calibrate(
    model: Path,
    engine: EngineSection,
    *,
    today: date,
    engine_s: float = 45.0,
    serving_s: float = 30.0,
    shapes: Sequence[ParallelShape] = (),
    progress: ReportProgress = lambda share, doing: None,
) -> Calibration:
    """Takes `engine_s` + `serving_s`, for each of `shapes` a third of that more (half of `engine_s` with several
    stages), and the time of loading. With `serving_s` 0 no cluster is started.

    `engine`: settings of one instance of one rank; its `threads` must be more than 0. `shapes` have several ranks.
    Raises CheckpointError, ConfigError, MeasurementError or RankLostError.
    """
    assert engine.threads > 0, "a calibration belongs to a number of threads"
    of_shapes_s = [engine_s * (_STAGES_SHARE if shape.pp > 1 else _SHAPE_SHARE) for shape in shapes]
    total_s = engine_s + sum(of_shapes_s) + serving_s * (1 + _SHAPE_SHARE * len(shapes))
    total_s += _EXCHANGES_S if shapes else 0.0
    parts = _Parts(progress, total_s)
    with open_profiler(model, engine) as profiler:
        layouts, max_model_len = [profiler.engine.layout], profiler.engine.capacity().max_model_len
        cells = profile_grid(PREFILL_BATCH_TOKENS, InstanceSection().max_batch, max_model_len)
        report = parts.begin(engine_s, "engine steps")
        calibration = _one_rank(model, engine, today, profiler, profiler.measure(cells, engine_s, report))
        one_rank, measured = OneRank(profiler, CalibratedCost(calibration.terms), cells), []
        for shape, shape_s in zip(shapes, of_shapes_s, strict=True):
            report = parts.begin(shape_s, f"engine steps of {shape}")
            of_shape, layout = measure_shape(model, settings_of(engine, shape), cells, shape_s, one_rank, report)
            measured.append(of_shape)
            layouts.append(layout)
        calibration = calibration.model_copy(update={"shapes": tuple(measured)})
    if serving_s > 0:
        calibration = _with_serving(calibration, model, engine, shapes, serving_s, max_model_len, parts)
    if shapes:
        calibration = _with_exchanges(calibration, engine, shapes, layouts, parts)
    progress(1.0, "done")
    return calibration


def default_shapes(engine: EngineSection) -> tuple[ParallelShape, ...]:
    """Two ranks, each way, where each has the threads of one rank, or a GPU, for itself."""
    if choose_device(engine.device).type == "cuda":
        has_room = torch.cuda.device_count() >= 2
    else:
        has_room = 2 * engine.threads <= usable_cores()
    return _SMALL_SHAPES if has_room else ()


def device_name(device: str) -> str:
    """The machine's own name of the device."""
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return str(torch.cuda.get_device_name())
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return "cpu"


class _Parts:
    """The progress of measurements one after the other."""

    def __init__(self, report: ReportProgress, total_s: float) -> None:
        self._report = report
        self._total_s = total_s
        self._begun_s = 0.0  # by all parts that have begun

    def begin(self, seconds: float, doing: str) -> Callable[[float], None]:
        """The next part, which takes so long. The result is called with the share of it that is done."""
        before_s, self._begun_s = self._begun_s, self._begun_s + seconds
        self._report(before_s / self._total_s, doing)
        return lambda share: self._report((before_s + share * seconds) / self._total_s, doing)


def _one_rank(
    model: Path, engine: EngineSection, today: date, profiler: EngineProfiler, measurements: Sequence[Measurement]
) -> Calibration:
    """The calibration of the engine alone."""
    layout = profiler.engine.layout
    terms = fit_terms(measurements)
    return Calibration(
        measured_on=today,
        device=device_name(engine.device),
        cores=usable_cores(),
        model=model.resolve().name,
        weights_hash=layout.weights_hash,
        dtype=layout.dtype,
        ops=profiler.engine.ops_name,
        threads=engine.threads,
        kv_bytes_per_token=layout.block_bytes / layout.block_size,
        kv_memory_bytes=engine.kv_memory,
        terms=terms,
        error=fit_error(terms, measurements),
        measurements=tuple(measurements),
    )


def _with_serving(
    calibration: Calibration,
    model: Path,
    engine: EngineSection,
    shapes: Sequence[ParallelShape],
    serving_s: float,
    max_model_len: int,
    parts: _Parts,
) -> Calibration:
    """What serving adds: to steps of a prefill and a decode worker side by side, and to a colocated instance of each
    shape."""
    report = parts.begin(serving_s, "prefill and decode at the same time")
    settings = engine.model_dump(mode="json")
    samples = asyncio.run(measure_serving(model, settings, serving_s, report, max_model_len=max_model_len))
    calibration = with_serving(calibration, samples)
    for shape in shapes:
        parts.begin(_SHAPE_SHARE * serving_s, f"requests to an instance of {shape}")
        cost = calibration.engine_cost(shape)
        assert cost is not None, "the shape was measured"
        serving = measure_shape_serving(
            model, settings_of(engine, shape), cost, calibration.serving, _SHAPE_SHARE * serving_s, max_model_len
        )
        calibration = calibration.with_serving(shape, serving)
    return calibration


def _with_exchanges(
    calibration: Calibration,
    engine: EngineSection,
    shapes: Sequence[ParallelShape],
    layouts: Sequence[KvLayout],
    parts: _Parts,
) -> Calibration:
    """Sums and messages of ranks, and KV between instances; between GPUs that is not measured."""
    parts.begin(_EXCHANGES_S / 2, "sums and messages between ranks")
    found: dict[str, object] = {"collectives": tuple(measure_collectives(shapes, engine.device))}
    if choose_device(engine.device).type == "cpu":
        report = parts.begin(_EXCHANGES_S / 2, "KV between instances of these shapes")
        found["transfers"] = tuple(measure_transfers(layouts, calibration.ops, report))
    return calibration.model_copy(update=found)

"""Measures a checkpoint on this machine: the engine's steps, their fit, and what serving adds."""

import asyncio
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from tandem.core.instance_section import EngineSection, InstanceSection
from tandem.deploy.machine import usable_cores
from tandem.placement.costs.calibration import Calibration, fit_error, fit_terms
from tandem.profiling.engine_profile import EngineProfiler, profile_grid
from tandem.profiling.serving_fit import with_serving
from tandem.profiling.serving_profile import measure_serving
from tandem.scheduling.budget import PREFILL_BATCH_TOKENS

ReportProgress = Callable[[float, str], None]
"""(share of the measurement that is done, what is being measured)."""


def calibrate(
    model: Path,
    engine: EngineSection,
    *,
    today: date,
    engine_s: float = 45.0,
    serving_s: float = 30.0,
    progress: ReportProgress = lambda share, doing: None,
) -> Calibration:
    """Takes `engine_s` + `serving_s`, and the time of loading. With `serving_s` 0 no cluster is started.

    `engine`: settings of one instance; its `threads` must be more than 0. Raises CheckpointError, ConfigError or
    MeasurementError.
    """
    assert engine.threads > 0, "a calibration belongs to a number of threads"
    engine_share = engine_s / (engine_s + serving_s)
    progress(0.0, "load the model")
    profiler = EngineProfiler(model, engine)
    layout, ops = profiler.engine.layout, profiler.engine.ops_name
    max_model_len = profiler.engine.capacity().max_model_len
    cells = profile_grid(PREFILL_BATCH_TOKENS, InstanceSection().max_batch, max_model_len)
    measurements = profiler.measure(cells, engine_s, lambda share: progress(engine_share * share, "engine steps"))
    profiler.close()
    terms = fit_terms(measurements)
    calibration = Calibration(
        measured_on=today,
        device=device_name(engine.device),
        cores=usable_cores(),
        model=model.resolve().name,
        weights_hash=layout.weights_hash,
        dtype=layout.dtype,
        ops=ops,
        threads=engine.threads,
        kv_bytes_per_token=layout.block_bytes / layout.block_size,
        kv_memory_bytes=engine.kv_memory,
        terms=terms,
        error=fit_error(terms, measurements),
        measurements=tuple(measurements),
    )
    if serving_s <= 0:
        return calibration
    progress(engine_share, "start a cluster")
    samples = asyncio.run(
        measure_serving(
            model,
            engine.model_dump(mode="json"),
            serving_s,
            lambda share: progress(engine_share + (1 - engine_share) * share, "prefill and decode at the same time"),
            max_model_len=max_model_len,
        )
    )
    return with_serving(calibration, samples)


def device_name(device: str) -> str:
    """The machine's own name of the device."""
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return str(torch.cuda.get_device_name())
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return "cpu"

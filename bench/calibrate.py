"""From a checkpoint to its calibration on this machine: the engine's steps, the fit, and what serving adds."""

import asyncio
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from bench.engine_profile import EngineProfiler, grid
from bench.serving_fit import with_serving
from bench.serving_profile import measure_serving
from tandem.core.config import DecodeSection, EngineSection, PrefillSection
from tandem.deploy.machine import usable_cores
from tandem.placement.costs.calibration import Calibration, fit_error, fit_terms

Progress = Callable[[float, str], None]
"""(share of the measuring that is done, what is being done)."""


def calibrate(
    model: Path,
    engine: EngineSection,
    *,
    today: date,
    engine_s: float = 45.0,
    serving_s: float = 30.0,
    progress: Progress = lambda share, doing: None,
) -> Calibration:
    """Takes `engine_s` and `serving_s`, and what loading takes; without `serving_s` no cluster is started.

    `engine` is that of one instance: its threads must be a number, those that the instance will have. Raises
    CheckpointError, ConfigError, or `bench.processes.BenchError`.
    """
    assert engine.threads > 0, "a calibration is of so many threads"
    engine_share = engine_s / (engine_s + serving_s)
    progress(0.0, "load the model")
    profiler = EngineProfiler(model, engine)
    layout, ops = profiler.engine.layout, profiler.engine.ops_name
    max_model_len = profiler.engine.capacity().max_model_len
    cells = grid(PrefillSection().max_batch_tokens, DecodeSection().max_batch, max_model_len)
    measurements = profiler.measure(cells, engine_s, lambda share: progress(engine_share * share, "engine steps"))
    profiler.close()
    terms = fit_terms(measurements)
    kv_bytes_per_token = layout.block_bytes / layout.block_size
    calibration = Calibration(
        measured_on=today,
        device=device_name(engine.device),
        cores=usable_cores(),
        model=model.resolve().name,
        weights_hash=layout.weights_hash,
        dtype=layout.dtype,
        ops=ops,
        threads=engine.threads,
        kv_bytes_per_token=kv_bytes_per_token,
        kv_memory_bytes=engine.kv_memory,
        terms=terms,
        error=fit_error(terms, measurements),
        measurements=tuple(measurements),
    )
    if serving_s <= 0:
        return calibration
    progress(engine_share, "start a cluster")
    answers = asyncio.run(
        measure_serving(
            model,
            engine.model_dump(mode="json"),
            serving_s,
            lambda share: progress(engine_share + (1 - engine_share) * share, "prefill and decode side by side"),
            max_model_len=max_model_len,
        )
    )
    return with_serving(calibration, answers)


def device_name(device: str) -> str:
    """As the machine itself calls it."""
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return str(torch.cuda.get_device_name())
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return "cpu"

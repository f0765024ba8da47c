"""Measures instances of several ranks on this machine: their steps, and what serving adds to them."""

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from tandem.core.instance_section import EngineSection
from tandem.core.kv_layout import KvLayout
from tandem.core.parallel import ParallelShape
from tandem.engine.engine import Engine
from tandem.placement.costs.calibration import FollowingSteps, ShapeCalibration
from tandem.placement.costs.rank_messages import StepMessages
from tandem.placement.costs.serving import ServingCosts
from tandem.placement.costs.step_fit import CalibratedCost, Measurement, fit_error, fit_terms
from tandem.profiling.engine_profile import (
    CellSequence,
    EngineProfiler,
    ProfileCell,
    following_cells,
    open_profiler,
)
from tandem.profiling.serving_fit import fit_alone
from tandem.profiling.serving_profile import measure_colocated

_FLOAT32_BYTES = 4
_REFERENCE_PROMPTS = tuple(ProfileCell(prompts=(CellSequence(size),)) for size in (32, 128, 512))
_REFERENCE_DECODES = tuple(ProfileCell(decodes=(CellSequence(1, 256),) * batch) for batch in (1, 4, 16))
_REFERENCE_S = 1.0

FOLLOWING_SHARE = 1 / 3
"""Of the time for a shape of several pipeline stages, for steps that follow each other."""


class OneRank:
    """An engine of one rank that stays loaded, and its costs as they were measured: how much slower is the machine now?

    A virtual machine shares its memory with others, and its speed changes. Shapes are compared with each other, so each
    is to be measured as if the machine had kept the speed that it had for one rank.
    """

    def __init__(self, profiler: EngineProfiler, cost: CalibratedCost, cells: Sequence[ProfileCell]) -> None:
        """`cells` are what the model can compute; some of them are used."""
        self._profiler = profiler
        self._cost = cost
        self._prompts = [cell for cell in cells if cell in _REFERENCE_PROMPTS]
        self._decodes = [cell for cell in cells if cell in _REFERENCE_DECODES]

    def slowdown(self) -> tuple[float, float]:
        """Of (prompts, decode): times of some steps, divided by those that were measured before."""
        return self._ratio(self._prompts), self._ratio(self._decodes)

    def _ratio(self, cells: Sequence[ProfileCell]) -> float:
        if not cells:
            return 1.0
        measured = self._profiler.measure(cells, _REFERENCE_S)
        return median(one.seconds / self._cost.step(one.load).total_s for one in measured)


def measure_shape(
    model: Path,
    engine: EngineSection,
    cells: Sequence[ProfileCell],
    budget_s: float,
    one_rank: OneRank,
    progress: Callable[[float], None],
) -> tuple[ShapeCalibration, KvLayout]:
    """The steps of an instance with the settings `engine`, all of whose ranks run on this machine, and its layout.

    `threads` of the settings are those of all ranks together. `one_rank` computes before and after. With several stages
    a third of `budget_s` is for steps that follow each other. Raises CheckpointError, ConfigError, MeasurementError or
    RankLostError.
    """
    alone_s = (1 - FOLLOWING_SHARE) * budget_s if engine.pp > 1 else budget_s
    with open_profiler(model, engine) as profiler:
        before = one_rank.slowdown()
        measured = profiler.measure(cells, alone_s, lambda share: progress(share * alone_s / budget_s))
        measured_following: list[Measurement] = []
        if engine.pp > 1:
            measured_following = profiler.measure_following(
                following_cells(cells),
                budget_s - alone_s,
                lambda share: progress((alone_s + share * (budget_s - alone_s)) / budget_s),
            )
        slowdown = [math.sqrt(first * second) for first, second in zip(before, one_rank.slowdown(), strict=True)]
        measurements = _at_speed(slowdown, measured)
        terms = fit_terms(measurements)
        layout = profiler.engine.layout
        pool_bytes = (layout.pool_of(rank).block_bytes for rank in range(layout.num_ranks))
        calibration = ShapeCalibration(
            tp=engine.tp,
            pp=engine.pp,
            kv_bytes_per_token=max(pool_bytes) / layout.block_size,
            messages=step_messages(profiler.engine, engine.shape),
            terms=terms,
            error=fit_error(terms, measurements),
            following=_following(_at_speed(slowdown, measured_following)) if measured_following else None,
            measurements=tuple(measurements),
        )
    return calibration, layout


def _at_speed(slowdown: Sequence[float], measured: Sequence[Measurement]) -> list[Measurement]:
    """What they would have been on a machine that is not slower, by (prompts, decode)."""
    return [
        one.model_copy(update={"seconds": one.seconds / slowdown[0 if one.prefill_tokens else 1]}) for one in measured
    ]


def _following(measurements: Sequence[Measurement]) -> FollowingSteps:
    terms = fit_terms(measurements)
    return FollowingSteps(terms=terms, error=fit_error(terms, measurements), measurements=tuple(measurements))


def step_messages(engine: Engine, shape: ParallelShape) -> StepMessages:
    """Two sums in a layer and one after the embedding; the hidden states from each stage to the next one."""
    hidden = engine.spec.hidden_size
    activation_bytes = _FLOAT32_BYTES if engine.ops_name.startswith("native") else engine.pool.itemsize
    summed_bytes = activation_bytes if engine.pool.is_cuda else _FLOAT32_BYTES  # CPUs add in float32
    return StepMessages(
        all_reduces=1 + 2 * engine.layout.num_layers if shape.tp > 1 else 0,
        all_reduce_bytes=summed_bytes * hidden if shape.tp > 1 else 0,
        sends=shape.pp - 1,
        send_bytes=activation_bytes * hidden if shape.pp > 1 else 0,
    )


def measure_shape_serving(
    model: Path,
    engine: EngineSection,
    cost: CalibratedCost,
    one_rank: ServingCosts,
    budget_s: float,
    max_model_len: int | None,
) -> ServingCosts:
    """What serving adds to the steps of a colocated instance with the settings `engine`, whose engine alone takes
    `cost`. While other instances compute, its steps are slowed as those of `one_rank`. Raises MeasurementError."""
    samples = asyncio.run(
        measure_colocated(model, engine.model_dump(mode="json"), budget_s, max_model_len=max_model_len)
    )
    return one_rank.with_steps_alone(*fit_alone(cost, samples))


def settings_of(engine: EngineSection, shape: ParallelShape) -> EngineSection:
    """Of an instance of this shape, with the threads of one rank's settings on each rank."""
    return engine.model_copy(update={"tp": shape.tp, "pp": shape.pp, "threads": engine.threads * shape.num_ranks})
